// Asks several models the same question at once and shows their answers as they come, one beside the other.

import { byId, element } from './dom.js';

const maxModels = 8;

/** @param {() => Record<string, string>} headers  of a request: the key */
export function startPlayground(headers) {
  const chosen = new Set();
  let running = null;

  const drawChosen = () => {
    byId('chosen').replaceChildren(
      ...[...chosen].map((name) => {
        const button = element('button', { type: 'button', 'aria-label': `Remove ${name}` }, `${name} ×`);
        button.addEventListener('click', () => {
          chosen.delete(name);
          drawChosen();
          byId('model').focus();
        });
        return element('li', {}, button);
      }),
    );
  };
  const add = () => {
    const name = byId('model').value.trim();
    if (name === '') return;
    if (chosen.size >= maxModels) {
      byId('play-state').textContent = `At most ${maxModels} models at a time.`;
      return;
    }
    chosen.add(name);
    byId('model').value = '';
    drawChosen();
  };
  byId('add').addEventListener('click', add);
  byId('model').addEventListener('keydown', (event) => {
    if (event.key !== 'Enter') return;
    event.preventDefault();
    add();
  });
  byId('play').addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) byId('play').requestSubmit();
  });
  byId('stop').addEventListener('click', () => running?.abort());
  byId('play').addEventListener('submit', async (event) => {
    event.preventDefault();
    add();
    if (running !== null) return;
    if (chosen.size === 0) {
      byId('play-state').textContent = 'Add a model first.';
      byId('model').focus();
      return;
    }
    running = new AbortController();
    byId('ask').disabled = true;
    byId('stop').hidden = false;
    byId('play-state').textContent = `Asking ${chosen.size}…`;
    const cards = [...chosen].map(answerCard);
    byId('answers').replaceChildren(...cards.map(({ root }) => root));
    const signal = running.signal;
    const ends = await Promise.all(cards.map((card) => ask(card, headers(), signal)));
    const numFailed = ends.filter((ok) => !ok).length;
    byId('play-state').textContent =
      numFailed === 0 ? 'All have answered.' : `${numFailed} did not answer to the end.`;
    byId('ask').disabled = false;
    byId('stop').hidden = true;
    running = null;
  });

  return {
    /** The names that may be asked, for completion while typing. */
    offer(names) {
      const list = byId('models');
      if (list.dataset.names === names.join('\n')) return;
      list.dataset.names = names.join('\n');
      list.replaceChildren(...names.map((name) => element('option', { value: name })));
      if (chosen.size === 0 && byId('answers').childElementCount === 0) {
        for (const name of names.slice(0, 2)) chosen.add(name);
        drawChosen();
      }
    },
    stop() {
      running?.abort();
      chosen.clear();
      drawChosen();
      byId('answers').replaceChildren();
    },
  };
}

function answerCard(model) {
  const text = element('pre', {});
  const facts = element('footer', {}, 'waits');
  const root = element('article', {
    class: 'card answer',
    'aria-label': `Answer of ${model}`,
    'aria-busy': 'true',
  });
  root.append(element('h3', {}, model), text, facts);
  return { model, root, text, facts };
}

/** Fills the card. @returns whether the answer came to its end */
async function ask({ model, root, text, facts }, headers, signal) {
  const startMs = performance.now();
  let firstMs = null;
  let numPieces = 0;
  const say = (end) => {
    const parts = firstMs === null ? [] : [`first after ${Math.round(firstMs - startMs)} ms`];
    if (numPieces > 1) {
      const perS = (1000 * (numPieces - 1)) / Math.max(1, performance.now() - firstMs);
      parts.push(`${numPieces} pieces, ${perS.toFixed(1)} a second`);
    }
    facts.textContent = [...parts, end].filter((part) => part !== '').join(' · ');
  };
  const fail = (message) => {
    root.classList.add('failed');
    say('');
    facts.append(element('p', { class: 'bad' }, message));
    return false;
  };
  try {
    const isChat = byId('as').value === 'chat';
    const question = byId('question').value;
    const response = await fetch(isChat ? '/v1/chat/completions' : '/v1/completions', {
      method: 'POST',
      headers: { ...headers, 'content-type': 'application/json' },
      body: JSON.stringify({
        model,
        ...(isChat ? { messages: [{ role: 'user', content: question }] } : { prompt: question }),
        temperature: Number(byId('temperature').value),
        max_tokens: Number(byId('max-tokens').value),
        stream: true,
      }),
      signal,
    });
    if (!response.ok) return fail(`${response.status}: ${await errorText(response)}`);
    for await (const event of events(response.body)) {
      if (event === '[DONE]') break;
      const { choices, error } = JSON.parse(event);
      if (error !== undefined) return fail(error.message);
      const piece = choices?.[0]?.delta?.content ?? choices?.[0]?.text ?? '';
      if (piece === '') continue;
      firstMs ??= performance.now();
      numPieces += 1;
      text.append(piece);
      say('');
    }
    say('done');
    return true;
  } catch (error) {
    return fail(signal.aborted ? 'stopped' : `the connection broke off: ${error.message}`);
  } finally {
    root.setAttribute('aria-busy', 'false');
  }
}

async function errorText(response) {
  const body = await response.text();
  try {
    return JSON.parse(body).error.message;
  } catch {
    return body.slice(0, 200);
  }
}

/** The data of each server-sent event. Comments, which keep a connection alive, are left out. */
async function* events(body) {
  const decoder = new TextDecoder();
  let rest = '';
  for await (const bytes of readAll(body)) {
    rest += decoder.decode(bytes, { stream: true });
    const whole = rest.split(/\r?\n\r?\n/);
    rest = whole.pop();
    for (const event of whole) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith('data:'));
      if (data.length > 0) yield data.map((line) => line.slice(5).trimStart()).join('\n');
    }
  }
}

async function* readAll(body) {
  const reader = body.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}
