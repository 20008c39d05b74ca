/**
 * Custom resource definitions of the projects whose kinds the chart can make, from their Go modules: the module proxy has
 * them where no other registry does.
 */
import { execFile } from 'node:child_process';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

/** Module -> its checksum, as in a go.sum, and its definitions. */
const modules = {
  'sigs.k8s.io/gateway-api@v1.5.1': {
    sum: 'h1:RqVRIlkhLhUO8wOHKTLnTJA6o/1un4po4/6M1nRzdd0=',
    files: ['config/crd/standard/gateway.networking.k8s.io_httproutes.yaml'],
  },
  'sigs.k8s.io/gateway-api-inference-extension@v1.5.0': {
    sum: 'h1:w9Awt60cmI1vM7Y6N81h8wDCBP0WkmxpdI7GKY0v070=',
    files: ['config/crd/bases/inference.networking.k8s.io_inferencepools.yaml'],
  },
  'github.com/cert-manager/cert-manager@v1.21.2': {
    sum: 'h1:UWgoYM+KLNtRlqmoWOKjKBOBUPVHeepQ6/ac3ERJW68=',
    files: ['deploy/crds/cert-manager.io_certificates.yaml'],
  },
  'github.com/prometheus-operator/prometheus-operator@v0.85.0': {
    sum: 'h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=',
    files: ['podmonitors', 'prometheusrules'].map(
      (name) => `example/prometheus-operator-crd/monitoring.coreos.com_${name}.yaml`,
    ),
  },
};

/** Paths of the definitions. Go keeps what it fetched, so only the first call on a machine takes seconds. */
export async function foreignDefinitions(): Promise<string[]> {
  // Outside of any Go module, so that only what is named is fetched.
  const options = { cwd: tmpdir(), env: { ...process.env, GOFLAGS: '-mod=mod' }, maxBuffer: 1024 * 1024 };
  const { stdout } = await promisify(execFile)(
    'go',
    ['mod', 'download', '-json', ...Object.keys(modules)],
    options,
  );
  const fetched = JSON.parse(`[${stdout.replaceAll(/}\s*{/g, '},{')}]`) as {
    Path: string;
    Version: string;
    Dir: string;
    Sum: string;
  }[];
  return Object.entries(modules).flatMap(([module, { sum, files }]) => {
    const { Dir, Sum } = fetched.find(({ Path, Version }) => `${Path}@${Version}` === module)!;
    if (Sum !== sum) throw new Error(`${module}: expected ${sum}, got ${Sum}`);
    return files.map((file) => join(Dir, file));
  });
}
