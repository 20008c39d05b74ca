// The live part of the page, drawn from /console/data.

import { byId, drawing, element, redraw } from './dom.js';

/** More rows than this are not drawn: who has thousands of adapters filters. */
const maxRows = 200;

export function drawAll(data) {
  redraw(byId('traffic'), data.traffic, drawTraffic);
  redraw(byId('bases'), data.bases, drawBases);
  drawAdapters(data.adapters);
  byId('routes-section').hidden = data.routes.length === 0;
  redraw(byId('routes'), data.routes, drawRoutes);
  byId('groups-section').hidden = data.groups.length === 0;
  redraw(byId('groups'), data.groups, drawGroups);
}

export function drawAdapters(adapters) {
  const wanted = byId('filter').value.trim().toLowerCase();
  const found = adapters.filter(({ name, base }) => `${name} ${base ?? ''}`.toLowerCase().includes(wanted));
  redraw(byId('adapters'), { found: found.slice(0, maxRows), numFound: found.length }, drawAdapterTable);
}

function drawTraffic({ models, windowS, inFlight, waiting, requestsBySecond, completionTokensBySecond }) {
  const sum = (key) => models.reduce((total, model) => total + model[key], 0);
  const timed = models.filter(({ ttfbMs }) => ttfbMs !== null);
  const requests = timed.reduce((total, { requestsPerS }) => total + requestsPerS, 0);
  const ttfbMs = timed.reduce((total, model) => total + model.ttfbMs * model.requestsPerS, 0) / requests;
  const numbers = element(
    'dl',
    { class: 'numbers' },
    number('Requests', rate(sum('requestsPerS')), 'a second', requestsBySecond),
    number('Tokens written', rate(sum('completionTokensPerS')), 'a second', completionTokensBySecond),
    number('Under way', inFlight, waiting === 0 ? 'none waits' : `${waiting} of them wait for an engine`),
    number('First byte', timed.length === 0 ? '–' : milliseconds(ttfbMs), 'on average'),
    number('Failed', rate(sum('errorsPerS')), 'a second'),
  );
  const note = `Requests of this key through this gateway. Rates are those of the last ${windowS} s, curves of the last minute.`;
  return [numbers, element('p', { class: 'legend' }, note), ...trafficTable(models)];
}

function trafficTable(models) {
  if (models.length < 2) return [];
  return [
    element(
      'div',
      { class: 'card' },
      table(
        'Traffic by model',
        ['Model', '#Requests/s', '#Tokens/s', '#First byte', '#Failed/s'],
        models.map((model) => [
          model.model,
          rate(model.requestsPerS),
          rate(model.completionTokensPerS),
          model.ttfbMs === null ? '–' : milliseconds(model.ttfbMs),
          rate(model.errorsPerS),
        ]),
      ),
    ),
  ];
}

function number(name, value, unit, curve) {
  return element(
    'div',
    { class: 'number' },
    element('dt', {}, name),
    element(
      'dd',
      {},
      String(value),
      ' ',
      element('small', {}, unit),
      curve === undefined ? null : line(curve),
    ),
  );
}

function line(values) {
  const top = Math.max(1, ...values);
  const points = values.map((value, index) => `${index},${(24 - (22 * value) / top).toFixed(1)}`).join(' ');
  const box = { viewBox: `0 0 ${values.length - 1} 25`, preserveAspectRatio: 'none', 'aria-hidden': 'true' };
  return drawing('svg', box, drawing('polyline', { points }));
}

function drawBases(bases) {
  if (bases.length === 0) return [element('p', { class: 'quiet' }, 'No base model is there for this key.')];
  return bases.map(({ name, mayUse, engines }) =>
    element(
      'article',
      { class: 'card' },
      element('h3', {}, name, mayUse ? null : element('span', { class: 'quiet' }, ' (through its adapters)')),
      engines.length === 0
        ? element('p', { class: 'quiet' }, 'No engine.')
        : table(
            `Engines of ${name}`,
            ['Engine', 'State', '#In flight', '#Adapters', 'Device memory', 'Host memory'],
            engines.map((engine) => [
              engine.name,
              engine.isReady ? 'ready' : element('span', { class: 'bad' }, 'away'),
              engine.inFlight,
              engine.numAdapters ?? '–',
              arena(engine.arena),
              arena(engine.hostArena),
            ]),
          ),
    ),
  );
}

function arena(use) {
  if (use === null || use.totalBytes === 0) return '–';
  const { totalBytes, adapterBytes, kvBytes, freeBytes } = use;
  const share = (bytes) => (100 * bytes) / totalBytes;
  const bar = drawing(
    'svg',
    { viewBox: '0 0 100 10', preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    drawing('rect', { class: 'adapters', x: 0, y: 0, width: share(adapterBytes), height: 10 }),
    drawing('rect', { class: 'kv', x: share(adapterBytes), y: 0, width: share(kvBytes), height: 10 }),
  );
  return element(
    'div',
    {},
    element('div', { class: 'bar' }, bar),
    element(
      'div',
      { class: 'legend' },
      element('span', { class: 'adapters' }, `adapters ${bytes(adapterBytes)}`),
      element('span', { class: 'kv' }, `KV ${bytes(kvBytes)}`),
      element('span', { class: 'free' }, `free ${bytes(freeBytes)} of ${bytes(totalBytes)}`),
    ),
  );
}

function drawAdapterTable({ found, numFound }) {
  if (numFound === 0) return [element('p', { class: 'quiet' }, 'No adapter.')];
  const rest = numFound > found.length ? `${numFound - found.length} more; filter to see them.` : '';
  const drawn = table(
    'Adapters',
    ['Adapter', 'Base model', '#Rank', '#Size', 'Where it is'],
    found.map(({ name, base, rank, bytes: size, places }) => [
      name,
      base ?? '–',
      rank ?? '–',
      size === null ? '–' : bytes(size),
      placeList(places),
    ]),
  );
  return [element('div', { class: 'card' }, drawn), element('p', { class: 'legend' }, rest)];
}

function placeList(places) {
  if (places.length === 0) return element('span', { class: 'quiet' }, 'on no engine');
  const items = places.map(({ engine, tier, inFlight, isReady }) =>
    element(
      'li',
      { class: `${tier ?? ''} ${isReady ? '' : 'away'}` },
      `${engine}${tier === null ? '' : `: ${tier}`}${inFlight > 0 ? `, ${inFlight} in use` : ''}${isReady ? '' : ' (away)'}`,
    ),
  );
  return element('ul', { class: 'places' }, ...items);
}

function drawRoutes(routes) {
  const rows = routes.map(({ name, targets }) => {
    const total = targets.reduce((sum, { weight, isServed }) => sum + (isServed ? weight : 0), 0);
    const items = targets.map((target) => {
      const percent = target.isServed && total > 0 ? (100 * target.weight) / total : 0;
      const text = target.isServed ? `${target.name}: ${rate(percent)} %` : `${target.name}: not there`;
      return element('li', { class: target.isServed ? 'device' : 'away' }, text);
    });
    return [name, element('ul', { class: 'places' }, ...items)];
  });
  return [element('div', { class: 'card' }, table('Routes', ['Route', 'Targets'], rows))];
}

function drawGroups(groups) {
  const rows = groups.map(({ name, members, isServed }) => {
    if (members === null) return [name, 'more than a request composes'];
    const items = members.map((member) => element('li', { class: isServed ? 'device' : 'away' }, member));
    return [name, element('ul', { class: 'places' }, ...items)];
  });
  return [element('div', { class: 'card' }, table('Groups', ['Group', 'Composed of'], rows))];
}

/** @param columns  a name that begins with # is of numbers */
function table(caption, columns, rows) {
  const isNumber = columns.map((name) => name.startsWith('#'));
  const cell = (tag, value, index, attributes) =>
    element(
      tag,
      { class: isNumber[index] ? 'num' : false, ...attributes },
      value instanceof Node ? value : String(value),
    );
  return element(
    'div',
    { class: 'scroll' },
    element(
      'table',
      { 'aria-label': caption },
      element(
        'thead',
        {},
        element(
          'tr',
          {},
          ...columns.map((name, index) => cell('th', name.replace('#', ''), index, { scope: 'col' })),
        ),
      ),
      element(
        'tbody',
        {},
        ...rows.map((row) =>
          element(
            'tr',
            {},
            ...row.map((value, index) =>
              index === 0 ? cell('th', value, index, { scope: 'row' }) : cell('td', value, index),
            ),
          ),
        ),
      ),
    ),
  );
}

function rate(value) {
  return value >= 100 ? String(Math.round(value)) : String(Math.round(value * 10) / 10);
}

function milliseconds(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(1)} s` : `${Math.round(value)} ms`;
}

function bytes(value) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  let left = value;
  while (left >= 1024 && unit < units.length - 1) {
    left /= 1024;
    unit += 1;
  }
  return `${left >= 10 || unit === 0 ? Math.round(left) : left.toFixed(1)} ${units[unit]}`;
}
