import { availableParallelism } from 'node:os';
import { configDefaults, defineConfig } from 'vitest/config';

// These need the real cluster. `tests/cluster/cluster.sh exec` says where it is, and then they are the only ones to run.
const clusterTests = ['tests/cluster/**/*.test.ts', 'tests/system/kubernetes/**/*.test.ts'];
const isInCluster = process.env.MOTET_CLUSTER !== undefined;

export default defineConfig({
  test: {
    include: isInCluster ? clusterTests : ['tests/**/*.test.ts'],
    exclude: isInCluster ? configDefaults.exclude : [...configDefaults.exclude, ...clusterTests],
    // They share one cluster, and some take a node or the API server away.
    fileParallelism: !isInCluster,
    // Many wait for an API server or a process: one core less, as is the default, would stand still for minutes.
    maxWorkers: availableParallelism(),
    globalSetup: ['tests/fixtures/control-plane-setup.ts'],
    // Addons may only be loaded from the main thread of a process once per environment, so tests run in
    // processes, not in worker threads.
    pool: 'forks',
    testTimeout: 30_000,
    hookTimeout: 120_000,
  },
});
