import { execFile } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { parse } from 'yaml';
import { readRules } from '../fixtures/monitoring.ts';
import { rulesFolder } from '../fixtures/prometheus.ts';

const unitTestsPath = join(import.meta.dirname, 'alerts.test.yaml');
const runbook = readFileSync(join(import.meta.dirname, '../../docs/runbook.md'), 'utf8');
const alerts = readRules().filter(({ alert }) => alert !== undefined);

const promtool = (...args: string[]) => promisify(execFile)('promtool', args);

test('promtool accepts the rules', async () => {
  const files = readdirSync(rulesFolder).map((name) => join(rulesFolder, name));
  const { stdout } = await promtool('check', 'rules', '--lint=all', '--lint-fatal', ...files);
  expect(stdout.match(/SUCCESS/g)).toHaveLength(files.length);
});

test('every alert fires on what it is for, and not on what resembles it', async () => {
  const { stdout } = await promtool('test', 'rules', unitTestsPath);
  expect(stdout).toContain('SUCCESS');
});

test('every alert has a case in which it fires and one in which it does not', () => {
  type Case = { alertname: string; exp_alerts: unknown[] };
  const { tests } = parse(readFileSync(unitTestsPath, 'utf8')) as { tests: { alert_rule_test: Case[] }[] };
  const cases = tests.flatMap(({ alert_rule_test }) => alert_rule_test);
  const namesOf = (chosen: Case[]) => [...new Set(chosen.map(({ alertname }) => alertname))].sort();
  const names = alerts.map(({ alert }) => alert).sort();
  expect(namesOf(cases.filter(({ exp_alerts }) => exp_alerts.length > 0))).toEqual(names);
  expect(namesOf(cases.filter(({ exp_alerts }) => exp_alerts.length === 0))).toEqual(names);
});

test('every alert says how bad it is, what happened, and where to read on', () => {
  for (const { alert, labels, annotations } of alerts) {
    expect(labels?.severity, alert).toMatch(/^(critical|warning)$/);
    expect(annotations, alert).toEqual({
      summary: expect.stringMatching(/\S/),
      description: expect.stringContaining('$labels.namespace'),
      runbook: `docs/runbook.md#${alert!.toLowerCase()}`,
    });
  }
});

test('the runbook has a section for every alert, and none besides, with what to look at and what to do', () => {
  const sections = runbook.split(/^## /m).slice(1);
  expect(sections.map((section) => section.split('\n')[0])).toEqual(alerts.map(({ alert }) => alert));
  for (const section of sections) {
    expect(section).toMatch(/^\*\*What it means\.\*\* /m);
    expect(section).toMatch(/^\*\*Look\.\*\* /m);
    expect(section).toMatch(/^\*\*Do\.\*\* /m);
  }
});
