import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['tests/**/*.test.ts'],
    // Addons may only be loaded from the main thread of a process once per environment, so tests run in
    // processes, not in worker threads.
    pool: 'forks',
    testTimeout: 30_000,
    hookTimeout: 120_000,
  },
});
