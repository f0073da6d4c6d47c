"""fastcompat: which response generator will teach a base model best."""
