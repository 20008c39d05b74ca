/**
 * Whether this node and this build have the device that was asked for. What is wrong becomes the engine's last words, and
 * in a cluster the message of a condition: one line, with what to do.
 */
import { readdirSync } from 'node:fs';
import { ConfigError } from './config.ts';

/** What a node has of NVIDIA's. */
export interface NvidiaParts {
  /** The loader finds libcuda.so.1. */
  hasLibrary: boolean;
  /** /dev/nvidia0 and its like. */
  deviceFiles: string[];
}

/** @throws ConfigError, when the engine cannot run on it */
export function checkDevice(device: 'cpu' | 'nvidia', probe = probeNvidia): void {
  if (device === 'nvidia') throw new ConfigError(`--device nvidia: ${nvidiaProblem(probe())}`);
}

export function nvidiaProblem({ hasLibrary, deviceFiles }: NvidiaParts): string {
  if (!hasLibrary) {
    return (
      "expected NVIDIA's driver on this node, got no libcuda.so.1; install the driver and NVIDIA's container toolkit " +
      '(in Kubernetes also the runtime class), or run on --device cpu'
    );
  }
  if (deviceFiles.length === 0) {
    return 'expected a GPU, got no /dev/nvidia* device; give the container one (in Kubernetes nvidia.com/gpu), or run on --device cpu';
  }
  return `expected a build with CUDA for ${deviceFiles.join(', ')}, got one that has no CUDA device yet; run on --device cpu`;
}

function probeNvidia(): NvidiaParts {
  return {
    hasLibrary: canBeLoaded('libcuda.so.1'),
    deviceFiles: readdirSync('/dev')
      .filter((name) => /^nvidia\d+$/.test(name))
      .map((name) => `/dev/${name}`)
      .sort(),
  };
}

/** Asks the loader itself, as it alone knows where it looks. A library that is found is no addon, which Node says after. */
function canBeLoaded(library: string): boolean {
  try {
    process.dlopen({ exports: {} }, library);
  } catch (error) {
    return !/cannot open shared object file/.test((error as Error).message);
  }
  return true;
}
