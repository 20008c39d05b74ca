// The console: a page of a few static files, which anybody may read since there is nothing in them, and its data, for which
// a key is needed. The page asks nobody but this gateway, runs nothing that is not in its files, and may be in no frame.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { NextFunction, Request, Response } from 'express';

const folder = join(import.meta.dirname, 'static');

const types = {
  html: 'text/html; charset=utf-8',
  css: 'text/css; charset=utf-8',
  js: 'text/javascript; charset=utf-8',
  svg: 'image/svg+xml',
};

/** Path -> file. Nothing else of the folder can be asked for. */
const files = {
  '/console': 'index.html',
  '/console/console.css': 'console.css',
  '/console/console.js': 'console.js',
  '/console/dom.js': 'dom.js',
  '/console/views.js': 'views.js',
  '/console/playground.js': 'playground.js',
  '/console/icon.svg': 'icon.svg',
};

export const consolePaths: readonly string[] = Object.keys(files);
export const consoleDataPath = '/console/data';

const contentSecurityPolicy = [
  "default-src 'none'",
  "script-src 'self'",
  "style-src 'self'",
  "img-src 'self'",
  "connect-src 'self'",
  "base-uri 'none'",
  "form-action 'none'",
  "frame-ancestors 'none'",
  "require-trusted-types-for 'script'",
].join('; ');

const headers = {
  'Content-Security-Policy': contentSecurityPolicy,
  'X-Content-Type-Options': 'nosniff',
  'Referrer-Policy': 'no-referrer',
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Resource-Policy': 'same-origin',
  'Cache-Control': 'no-cache',
};

/** Answers GET and HEAD for the files of the page; they are read once. */
export function serveConsole() {
  const pages = new Map(
    Object.entries(files).map(([path, file]) => {
      const type = types[file.split('.').at(-1) as keyof typeof types];
      return [path, { type, body: readFileSync(join(folder, file)) }];
    }),
  );
  return function serveConsoleFile(req: Request, res: Response, next: NextFunction): void {
    const page = pages.get(req.path === '/console/' ? '/console' : req.path);
    if (page === undefined || !['GET', 'HEAD'].includes(req.method)) next();
    else res.set(headers).set('Content-Type', page.type).send(page.body);
  };
}
