// The console in a real browser, Debian's Chromium, in front of a real gateway and fake engines. One browser for all tests.

import { type Browser, chromium, type Page } from 'playwright-core';
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest';
import {
  beginStream,
  chunkEvent,
  type FakeEngine,
  refuse,
  startFakeEngine,
} from '../../fixtures/fake-engine.ts';
import { gatewayFor, type TestGateway } from '../start-gateway.ts';

const key = 'key-0123456789abcdef';
let browser: Browser;

beforeAll(async () => {
  browser = await chromium.launch({
    executablePath: process.env.MOTET_CHROMIUM ?? '/usr/bin/chromium',
    args: ['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu'],
  });
});
afterAll(() => browser?.close());

type Visit = { page: Page; gateway: TestGateway; engine: FakeEngine; problems: string[]; hosts: Set<string> };

/** A page at the console of a gateway that wants a key. What the page complains about fails the test. */
async function visit(settings: Parameters<typeof gatewayFor>[1] = {}): Promise<Visit> {
  const engine = await startFakeEngine({ base: 'Base-1B', adapters: ['sql', 'docs'] });
  const gateway = await gatewayFor([engine], { apiKeys: new Map([['team-a', key]]), ...settings });
  const context = await browser.newContext({ viewport: { width: 1280, height: 1000 } });
  const page = await context.newPage();
  const problems: string[] = [];
  const hosts = new Set<string>();
  page.on('pageerror', (error) => problems.push(error.message));
  page.on('console', (line) => {
    if (line.type() === 'error' && !line.text().includes('status of 401')) problems.push(line.text());
  });
  page.on('request', (request) => hosts.add(new URL(request.url()).host));
  onTestFinished(() => context.close());
  await page.goto(`${gateway.url}/console`);
  return { page, gateway, engine, problems, hosts };
}

async function enter(page: Page, withKey = key): Promise<void> {
  await page.getByLabel('API key').fill(withKey);
  await page.getByRole('button', { name: 'Enter' }).click();
}

test('a key opens the page, and what it may use is shown live', async () => {
  const { page, engine, gateway, problems, hosts } = await visit();
  await enter(page, 'not-a-key-of-this-gateway');
  await expect.poll(() => page.getByRole('alert').textContent()).toContain('not one of this gateway');
  await enter(page);
  await page.getByRole('table', { name: 'Engines of Base-1B' }).waitFor();
  expect(await page.getByText('team-a').isVisible()).toBe(true);
  const adapters = page.getByRole('table', { name: 'Adapters' });
  await expect.poll(() => adapters.getByRole('rowheader').allTextContents()).toEqual(['docs', 'sql']);

  engine.adapters.set('fresh', 'host');
  await adapters.getByRole('row', { name: /^fresh.*: host/ }).waitFor();
  await page.getByLabel('Filter').fill('SQ');
  await expect.poll(() => adapters.getByRole('rowheader').allTextContents()).toEqual(['sql']);

  // A reload asks for nothing again; another tab does.
  await page.reload();
  await page.getByRole('table', { name: 'Adapters' }).waitFor();
  const other = await page.context().newPage();
  await other.goto(`${gateway.url}/console`);
  await other.getByLabel('API key').waitFor();
  await page.getByRole('button', { name: 'Forget key' }).click();
  await page.getByLabel('API key').waitFor();
  expect(
    await page.evaluate(() => (globalThis as unknown as { sessionStorage: object }).sessionStorage),
  ).toEqual({});
  expect(problems).toEqual([]);
  expect([...hosts]).toEqual([new URL(gateway.url).host]);
});

test('several adapters answer the same question side by side, by keyboard alone', async () => {
  const { page, engine, problems } = await visit({ apiKeys: null });
  engine.script = (received) => {
    const { model } = JSON.parse(received.body.toString()) as { model: string };
    if (model === 'sql') return refuse(400, 'no_such_thing')(received);
    beginStream(received.res);
    received.res.write(': waiting for an engine, 3 s\n\n');
    for (const word of ['<b>one</b>', ' two']) received.res.write(chunkEvent(word, model));
    received.res.end('data: [DONE]\n\n');
  };
  await page.getByRole('button', { name: 'Remove docs' }).waitFor();
  await page.getByLabel('Models', { exact: true }).fill('Base-1B');
  await page.keyboard.press('Enter');
  await page.getByLabel('Question').fill('What is a motet?');
  await page.keyboard.press('Control+Enter');
  await page.getByText('1 did not answer to the end.').waitFor();

  const answer = (name: string) => page.getByRole('article', { name: `Answer of ${name}` });
  // Markup of a model is text.
  expect(await answer('docs').locator('pre').textContent()).toBe('<b>one</b> two');
  expect(await answer('Base-1B').textContent()).toContain('done');
  expect(await answer('sql').textContent()).toContain('400: the fake engine refuses');
  const bodies = engine.received.map(({ body }) => JSON.parse(body.toString()));
  expect(bodies.map(({ model }) => model).sort()).toEqual(['Base-1B', 'docs', 'sql']);
  expect(bodies[0]).toMatchObject({
    messages: [{ role: 'user', content: 'What is a motet?' }],
    stream: true,
  });
  expect(problems.filter((problem) => !problem.includes('status of 400'))).toEqual([]);
});

test('every control has a name, and colours have contrast, in the light and in the dark', async () => {
  const { page } = await visit({ apiKeys: null });
  await page.getByRole('table', { name: 'Adapters' }).waitFor();
  for (const colorScheme of ['light', 'dark'] as const) {
    await page.emulateMedia({ colorScheme });
    expect(await page.evaluate(faultsOfPage)).toEqual([]);
  }
  await page.setViewportSize({ width: 360, height: 740 });
  expect(await page.evaluate('document.documentElement.scrollWidth')).toBeLessThanOrEqual(360);
});

/** Runs in the page: controls without a name, and texts with less contrast than WCAG's 4.5. */
const faultsOfPage = `(() => {
  const faults = [];
  const visible = (element) => element.checkVisibility() && element.getClientRects().length > 0;
  for (const control of document.querySelectorAll('input, select, textarea, button')) {
    if (!visible(control)) continue;
    const name = control.labels?.length || control.ariaLabel || (control.tagName === 'BUTTON' && control.textContent.trim());
    if (!name) faults.push('no name: ' + control.outerHTML);
  }
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const luminance = (color) => {
    const [r, g, b] = [...rgba(color)].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at !== null; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (rgba(color)[3] === 255) return color;
    }
    return 'white';
  };
  for (const element of document.querySelectorAll('body *')) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim() !== '');
    if (!hasText || !visible(element) || element.closest('noscript, option')) continue;
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(ground(element))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) faults.push('contrast ' + contrast.toFixed(1) + ': ' + element.textContent.trim());
  }
  return faults;
})()`;

test('the page asks nobody but the gateway, and its data is for a key', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { apiKeys: new Map([['team-a', key]]) });
  const page = await fetch(`${gateway.url}/console`);
  expect(page.status).toBe(200);
  const policy = page.headers.get('content-security-policy')!;
  for (const part of [
    "default-src 'none'",
    "script-src 'self'",
    "frame-ancestors 'none'",
    "form-action 'none'",
  ]) {
    expect(policy).toContain(part);
  }
  expect((await fetch(`${gateway.url}/console/data`)).status).toBe(401);
  expect((await fetch(`${gateway.url}/console`, { method: 'POST' })).status).toBe(405);
  expect((await fetch(`${gateway.url}/console/..%2fconsole.ts`)).status).toBe(401);
  const off = await gatewayFor([engine], { hasConsole: false });
  expect((await fetch(`${off.url}/console`)).status).toBe(404);
  expect((await fetch(`${off.url}/console/data`)).status).toBe(404);
});
