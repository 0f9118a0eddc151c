// The page: what its parts are told of messages and events.

import { setUpBegin } from "./begin.js";
import { setUpCompare } from "./compare.js";
import { setUpConditions } from "./conditions.js";
import { $ } from "./dom.js";
import { changed, done, draw, failed, finish, painted, progress, showPeek, stop } from "./drawing.js";
import { clearErrors, showError } from "./errors.js";
import { loadExample, setUpFiles } from "./files.js";
import { showMisses } from "./results.js";
import { setUpSettings, showChoices } from "./settings.js";
import { Connection } from "./socket.js";
import { answered, painting, state } from "./state.js";
import { setUpTheme } from "./theme.js";

function received(record, parts) {
  const handler = { hello, progress, done, error: failed, example: answered, content: answered }[record.type];
  handler?.(record, parts);
}

function connected(up) {
  $("connection").textContent = up ? "connected" : "no connection";
  $("connection").classList.toggle("up", up);
  if (!up && state.asked) finish();
  if (!up && state.hello) showError("the connection is lost: the page tries again by itself");
}

function hello(record) {
  const first = !state.hello;
  state.hello = record;
  $("version").textContent = record.version;
  clearErrors();
  if (!first) return;
  showChoices();
  loadExample(true);
}

painting.onChange = painted;
setUpConditions();
setUpSettings();
setUpFiles();
setUpBegin();
setUpCompare();
setUpTheme($("theme"));
$("generate").onclick = draw;
$("stop").onclick = stop;
$("live").onchange = changed;
$("misses").onchange = showMisses;
$("peek").onclick = () => $("output").scrollIntoView({ block: "start" });
document.addEventListener("keydown", (event) => {
  const writes = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "range";
  if (event.key === "Escape" && state.asked) stop();
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && !writes && !$("paint").hidden) {
    event.preventDefault();
    painting.undo();
  }
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") draw();
});

const inSight = { pictures: 1, board: 1 };
const watch = new IntersectionObserver((all) => {
  for (const entry of all) inSight[entry.target.id] = entry.intersectionRatio;
  state.seen = inSight.pictures >= 0.4 || inSight.board < 0.4;
  showPeek();
}, { threshold: [0, 0.4] });
watch.observe($("pictures"));
watch.observe($("board"));

// For tests, which look at what is painted and not at what the canvas makes of it.
Object.assign(window, { painting, demoState: state });
state.connection = new Connection(new URL("ws", location.href.replace(/^http/, "ws")), received, connected);
