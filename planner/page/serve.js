"use strict";
// The pages work without this: it takes a config.json that is dropped or chosen, and says that a search is on.
(function () {
  const config = document.getElementById("config");
  const drop = document.getElementById("drop");
  const file = document.getElementById("file");
  const taken = document.getElementById("taken");
  const own = document.getElementById("own");
  const model = document.getElementById("model");

  async function take(one) {
    const most = Number(config.dataset.most);
    own.open = true;
    if (one.size > most) {
      taken.textContent = one.name.slice(0, 80) + " has " + one.size.toLocaleString("en") + " bytes; a config.json of up to " + most.toLocaleString("en") + " is taken.";
      return;
    }
    config.value = await one.text();
    model.value = "";
    taken.textContent = one.name.slice(0, 80) + " is taken, " + one.size.toLocaleString("en") + " bytes.";
  }

  document.getElementById("file-row").hidden = false;
  file.addEventListener("change", function () { if (file.files.length) { take(file.files[0]); } });
  config.addEventListener("input", function () { if (config.value.trim()) { model.value = ""; } });

  // A file that misses the box is taken too: the browser would leave the page for it.
  document.addEventListener("dragover", function (event) { event.preventDefault(); own.open = true; drop.classList.add("over"); });
  document.addEventListener("dragleave", function (event) { if (!event.relatedTarget) { drop.classList.remove("over"); } });
  document.addEventListener("drop", function (event) {
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) { event.preventDefault(); take(event.dataTransfer.files[0]); }
  });

  for (const form of document.forms) {
    form.addEventListener("submit", function () {
      const wait = form.querySelector("#wait");
      for (const button of form.querySelectorAll("button")) { setTimeout(function () { button.disabled = true; }); }
      if (wait) { wait.textContent = "Searching: seconds for most questions, a minute where a large one does not fit."; }
    });
  }
  // Back from an answer, the form is to be used again.
  window.addEventListener("pageshow", function () {
    for (const button of document.querySelectorAll("button")) { button.disabled = false; }
    const wait = document.getElementById("wait");
    if (wait) { wait.textContent = ""; }
  });
})();
