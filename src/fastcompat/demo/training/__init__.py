"""How the demo's two models were made. Nothing imports this: it is here so that anybody can make them again."""
