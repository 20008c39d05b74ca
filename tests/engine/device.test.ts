import { describe, expect, test } from 'vitest';
import { checkDevice, nvidiaProblem } from '../../engine/device.ts';

describe('--device', () => {
  test('cpu needs nothing, and looks at nothing', () => {
    const probe = () => {
      throw new Error('looked');
    };
    expect(() => checkDevice('cpu', probe)).not.toThrow();
  });

  test.each([
    ['no driver', { hasLibrary: false, deviceFiles: [] }, 'got no libcuda.so.1; install the driver'],
    ['files without a driver', { hasLibrary: false, deviceFiles: ['/dev/nvidia0'] }, 'got no libcuda.so.1'],
    ['a driver without a GPU', { hasLibrary: true, deviceFiles: [] }, 'got no /dev/nvidia* device; give the'],
    ['both', { hasLibrary: true, deviceFiles: ['/dev/nvidia0', '/dev/nvidia1'] }, 'has no CUDA device yet'],
  ])('nvidia on a node with %s says what to do, in one line', (_name, parts, message) => {
    expect(() => checkDevice('nvidia', () => parts)).toThrow(`--device nvidia: ${nvidiaProblem(parts)}`);
    expect(nvidiaProblem(parts)).toContain(message);
    expect(nvidiaProblem(parts)).toContain('--device cpu');
    expect(nvidiaProblem(parts)).not.toContain('\n');
  });
});
