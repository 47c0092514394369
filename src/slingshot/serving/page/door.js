// The key that a server may ask for, and what its refusals say.

import { $ } from "./dom.js";
import { word } from "./words.js";


function open() {
  $("secret").value = "";
  $("key").hidden = false;
  if (!$("door").open) $("door").showModal();
}

// then(): what is done once there is a key.
export function guardDoor(then) {
  $("key").onclick = open;
  $("leave").onclick = () => $("door").close();
  $("door").querySelector("form").addEventListener("submit", () => {
    localStorage.setItem("key", $("secret").value.trim());
    then();
  });
}

// What went wrong, as it is told; a key is asked for where one is missing.
export function failureOf(error) {
  if (error.status === 401) {
    open();
    if (!localStorage.getItem("key")) return word("key_wanted");
  }
  if (error instanceof TypeError) return word("fails");
  return error.later ? `${error.message} ${word("later_on", error.later)}` : error.message;
}
