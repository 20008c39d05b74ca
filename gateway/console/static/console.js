// Starts the page: the key, which is kept for as long as the tab is open, and a look at /console/data each second.

import { byId } from './dom.js';
import { startPlayground } from './playground.js';
import { drawAdapters, drawAll } from './views.js';

const lookEveryMs = 1000;
const keyName = 'motet-key';

let key = sessionStorage.getItem(keyName);
let adapters = [];
let timer;
/** Counts comings and goings, so that an answer for a key that was forgotten is not shown. */
let visit = 0;

const headers = () => (key === null ? {} : { authorization: `Bearer ${key}` });
const playground = startPlayground(headers);

async function look() {
  clearTimeout(timer);
  const mine = visit;
  try {
    const response = await fetch('/console/data', {
      headers: headers(),
      signal: AbortSignal.timeout(10_000),
    });
    const body = await response.json();
    if (mine !== visit) return;
    if (response.status === 401) return forget(key === null ? '' : body.error.message);
    if (!response.ok) throw new Error(body.error.message);
    show(body);
  } catch (error) {
    if (mine !== visit) return;
    say('away', `the gateway does not answer: ${error.message}`);
  }
  if (!document.hidden) timer = setTimeout(look, lookEveryMs);
}

function show(data) {
  byId('door').hidden = true;
  byId('inside').hidden = false;
  byId('leave').hidden = key === null;
  byId('who').textContent = data.tenant ?? 'no key needed';
  say('live', 'live');
  adapters = data.adapters;
  drawAll(data);
  const held = adapters.filter(({ places }) => places.length > 0).map(({ name }) => name);
  const bases = data.bases.filter(({ mayUse }) => mayUse).map(({ name }) => name);
  playground.offer([...held, ...bases, ...[...data.routes, ...data.groups].map(({ name }) => name)]);
}

function forget(why) {
  visit += 1;
  clearTimeout(timer);
  key = null;
  sessionStorage.removeItem(keyName);
  playground.stop();
  byId('inside').hidden = true;
  byId('leave').hidden = true;
  byId('who').textContent = '';
  say('', '');
  byId('refusal').textContent = why;
  byId('door').hidden = false;
  byId('key').value = '';
  byId('key').focus();
}

function say(is, text) {
  const state = byId('state');
  if (state.textContent === text) return;
  state.textContent = text;
  if (is === '') delete state.dataset.is;
  else state.dataset.is = is;
}

byId('door').addEventListener('submit', (event) => {
  event.preventDefault();
  key = byId('key').value.trim();
  sessionStorage.setItem(keyName, key);
  byId('refusal').textContent = '';
  visit += 1;
  void look();
});
byId('leave').addEventListener('click', () => forget(''));
byId('filter').addEventListener('input', () => drawAdapters(adapters));
document.addEventListener('visibilitychange', () => {
  if (!document.hidden && !byId('inside').hidden) void look();
});

void look();
