// Keeps the page live: fetches it again, and puts what is new in the place of what was.
"use strict";

const EVERY = 1500; // milliseconds: what has begun is to be seen within two seconds
const live = document.getElementById("live");

function isRead() { // a selection would be lost
  return !getSelection().isCollapsed;
}

async function renew() {
  const answer = await fetch(location.href, { cache: "no-store", headers: { Accept: "text/html" } });
  if (!answer.ok) {
    throw new Error(`the server answers ${answer.status}`);
  }
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const old = document.querySelector("main");
  const fresh = page.querySelector("main");
  for (const each of old.querySelectorAll("details[open]")) {
    fresh.querySelector(`#${CSS.escape(each.id)}`)?.setAttribute("open", "");
  }
  const focused = document.activeElement?.closest("details")?.id;
  old.replaceWith(document.adoptNode(fresh));
  if (focused) {
    document.getElementById(focused)?.querySelector("summary").focus();
  }
  document.title = page.title;
}

async function keepLive() {
  if (!document.hidden && !isRead()) {
    try {
      await renew();
      live.textContent = "live";
      live.className = "";
    } catch (error) {
      live.textContent = `no answer since ${new Date().toLocaleTimeString()}: ${error.message}`;
      live.className = "bad";
      setTimeout(keepLive, 2 * EVERY);
      return;
    }
  }
  setTimeout(keepLive, EVERY);
}

keepLive();
