/** Applies the files of crds/ as they are and waits until the API server serves the kinds. Any number may do so at once. */
import { join } from 'node:path';
import { type ControlPlane, kubectl } from '../fixtures/control-plane.ts';

export const crdFolder = join(import.meta.dirname, '../../crds');

export async function installCrds(plane: ControlPlane): Promise<void> {
  await kubectl(plane, ['apply', '--server-side', '--force-conflicts', '-f', crdFolder]);
  await kubectl(plane, ['wait', '--for=condition=Established', '-f', crdFolder, '--timeout=60s']);
}
