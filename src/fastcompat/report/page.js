"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("chart-specifications").textContent);
  const options = {
    renderer: "svg",
    actions: false,
    ast: true, // expressions are interpreted: the page forbids eval
    defaultStyle: false,
    tooltip: { disableDefaultStyle: true },
    logLevel: 1, // errors
  };

  const draw = (section) => {
    for (const place of section.querySelectorAll(".chart:not([data-drawn])")) {
      place.dataset.drawn = "";
      vegaEmbed(place, specs[place.id], options).catch((error) => {
        place.textContent = "This chart could not be drawn; its figures are in the table.";
        console.error(error);
      });
    }
  };

  const sections = [...document.querySelectorAll("section.pair")];
  const choice = document.getElementById("pair");
  if (choice) {
    const show = () => {
      sections.forEach((section, index) => (section.hidden = index !== Number(choice.value)));
      draw(sections[Number(choice.value)]);
    };
    choice.closest(".choice").hidden = false;
    choice.addEventListener("change", show);
    show();
  } else {
    sections.forEach(draw);
  }
  // What is folded on the screen is not folded on paper.
  addEventListener("beforeprint", () => {
    for (const folded of document.querySelectorAll("details:not([open])")) {
      folded.open = true;
      folded.dataset.folded = "";
    }
  });
  addEventListener("afterprint", () => {
    for (const folded of document.querySelectorAll("details[data-folded]")) {
      folded.open = false;
      delete folded.dataset.folded;
    }
  });
})();
