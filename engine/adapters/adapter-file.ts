/**
 * Reads a PEFT folder, adapter_config.json and adapter_model.safetensors, and checks it against the base model before
 * any weight is moved. Whatever would change the base's answers and is not supported is refused by name; nothing is left
 * out silently. The tensors decide which modules an adapter has; the config must agree with them.
 *
 * The digest is sha256 over what the adapter computes with: the meaningful part of the config as canonical JSON, then each
 * tensor's name, type, shape and bytes, by name. Paths, versions and training settings are not part of it.
 * Sources: LoRA (Hu et al., 2021), rsLoRA (Kalajdzievski, 2023), DoRA (Liu et al., 2024), and PEFT for the file.
 */
import { createHash } from 'node:crypto';
import { open, readdir, readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { type AdapterModule, type ModelDims, type TargetModule, targetModules } from '../../native/index.ts';
import { EngineError } from '../errors.ts';
import { type InputError, shown } from '../input-error.ts';
import { readSafetensors, type SafetensorsFile, type SafetensorsTensor } from '../model/safetensors.ts';
import type { AdapterFile } from './adapter-tiers.ts';

export interface AdapterLimits {
  maxRank: number;
}

/**
 * @param folder with adapter_config.json and adapter_model.safetensors
 * @throws EngineError adapter_file_not_found, adapter_rank_too_large, or adapter_invalid naming the field or tensor
 */
export async function readAdapterFile(
  folder: string,
  dims: ModelDims,
  limits: AdapterLimits,
): Promise<AdapterFile> {
  const config = parseAdapterConfig(await readConfig(folder), dims);
  const path = join(folder, 'adapter_model.safetensors');
  const before = await statWeights(folder, path);
  const file = await readWeights(folder);
  const modules = collectModules(file, config, dims);
  const rank = Math.max(...modules.map((module) => module.rank));
  if (rank > limits.maxRank) {
    const message = `rank of ${folder}: expected at most the maximum rank setting ${limits.maxRank}, got ${rank}`;
    throw new EngineError('adapter_rank_too_large', message, { param });
  }
  const digest = await digestOf(file, config);
  const after = await statWeights(folder, path);
  if (before !== after) refuse(path, 'a file that stays as it is while it is read', 'one that changed');
  return {
    digest,
    path,
    modules,
    rank,
    targets: [...new Set(modules.map((module) => module.target))].sort(),
    kind: config.usesDora ? 'dora' : config.usesRslora ? 'rslora' : 'lora',
    sizeBytes: [...file.tensors.values()].reduce((sum, tensor) => sum + tensor.sizeBytes, 0),
  };
}

/** The digest of a folder that may be for any base model: nothing is checked but what the digest is made of. */
export async function digestOfFolder(folder: string): Promise<string> {
  const config = parseAdapterConfig(await readConfig(folder), null);
  return digestOf(await readWeights(folder), config);
}

/** A module of an adapter, whatever its base model. */
export interface AdapterPart {
  /** As in the base model: `model.layers.0.self_attn.q_proj`. */
  moduleName: string;
  rank: number;
  scaling: number;
  a: SafetensorsTensor;
  b: SafetensorsTensor;
}

/**
 * The modules of an adapter that is LoRA or rsLoRA without biases, by name; shapes are not checked against a base model.
 * @throws EngineError as readAdapterFile; adapter_invalid for DoRA and biases
 */
export async function readAdapterParts(folder: string): Promise<AdapterPart[]> {
  const config = parseAdapterConfig(await readConfig(folder), null);
  if (config.usesDora) refuse('use_dora', 'false', 'true');
  if (config.hasBias) refuse('lora_bias', 'false', 'true');
  return collectParts(await readWeights(folder), config)
    .map((module) => {
      const { moduleName } = module;
      const { rank, alpha } = rankOf(moduleName, config);
      const { a, b } = pairOf(module);
      expectShape(a, [rank, a.shape[1] ?? 0]);
      expectShape(b, [b.shape[0] ?? 0, rank]);
      return { moduleName, rank, scaling: scalingOf(alpha, rank, config), a, b };
    })
    .sort((a, b) => (a.moduleName < b.moduleName ? -1 : 1));
}

async function readWeights(folder: string): Promise<SafetensorsFile> {
  const path = join(folder, 'adapter_model.safetensors');
  await statWeights(folder, path);
  return readSafetensors(path).catch((error: InputError) => {
    throw new EngineError('adapter_invalid', error.message, { param, cause: error });
  });
}

/** The request field that names an adapter. */
const param = 'lora_path';

function refuse(field: string, expected: string, got: string): never {
  throw new EngineError('adapter_invalid', `${field}: expected ${expected}, got ${got}`, { param });
}

const maxConfigBytes = 1 << 20;

async function readConfig(folder: string): Promise<Record<string, unknown>> {
  const path = join(folder, 'adapter_config.json');
  const notFound = (cause: unknown): never => {
    throw new EngineError(
      'adapter_file_not_found',
      `${path}: expected a readable file, got ${codeOf(cause)}`,
      { param, cause },
    );
  };
  const { size } = await stat(path).catch(notFound);
  if (size > maxConfigBytes) refuse('adapter_config.json', `at most ${maxConfigBytes} bytes`, `${size}`);
  const text = await readFile(path, 'utf8').catch(notFound);
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    refuse('adapter_config.json', 'JSON', 'something else');
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    refuse('adapter_config.json', 'an object', shown(value));
  return value as Record<string, unknown>;
}

const codeOf = (error: unknown) => (error as NodeJS.ErrnoException).code ?? String(error);

/** What tells one state of the weights file from another. */
async function statWeights(folder: string, path: string): Promise<string> {
  const info = await stat(path, { bigint: true }).catch(async (cause) => {
    const pickled = (await readdir(folder).catch(() => [])).find((name) => /\.(bin|pt|pth|pkl)$/.test(name));
    if (pickled) refuse('adapter_model.safetensors', 'a file (pickled weights are not read)', pickled);
    throw new EngineError(
      'adapter_file_not_found',
      `${path}: expected a readable file, got ${codeOf(cause)}`,
      { param, cause },
    );
  });
  return `${info.ino} ${info.size} ${info.mtimeNs}`;
}

/** The part of a PEFT config that matters for computing with the adapter. */
interface AdapterConfig {
  rank: number;
  alpha: number;
  /** The first pattern that matches a module's name decides. */
  rankPatterns: [string, number][];
  alphaPatterns: [string, number][];
  usesRslora: boolean;
  usesDora: boolean;
  hasBias: boolean;
  /** null: a regular expression or all-linear, which the tensors spell out. */
  targets: string[] | null;
  /** null: all. */
  layers: number[] | null;
}

/** Settings that change what is computed, and what they must be for it to be plain LoRA on linear layers. */
const refusedSettings = [
  'modules_to_save',
  'fan_in_fan_out',
  'target_parameters',
  'trainable_token_indices',
  'alora_invocation_tokens',
  'use_qalora',
  'layer_replication',
  'use_bdlora',
  'arrow_config',
  'kasa_config',
  'monteclora_config',
];
/** Starting values that leave the base's weights as they are. Others (pissa, olora, loftq, ...) change them. */
const harmlessInits = [true, false, 'gaussian', 'eva', 'orthogonal'];

/** @param dims of the base model; null: it is not known, and layers may be any */
export function parseAdapterConfig(config: Record<string, unknown>, dims: ModelDims | null): AdapterConfig {
  if (config.peft_type !== 'LORA') refuse('peft_type', 'LORA', shown(config.peft_type));
  for (const name of refusedSettings) {
    const value = config[name];
    const isOff = value == null || value === false || (Array.isArray(value) && value.length === 0);
    if (!isOff) refuse(name, 'none; it is not supported', shown(value));
  }
  const bias = config.bias ?? 'none';
  if (bias !== 'none') refuse('bias', 'none; trained biases of the base are not supported', shown(bias));
  const init = config.init_lora_weights ?? true;
  if (!harmlessInits.includes(init as boolean)) {
    refuse(
      'init_lora_weights',
      `one of ${harmlessInits.join(', ')}; others change the base's weights`,
      shown(init),
    );
  }
  return {
    rank: positive(config, 'r', isCount),
    alpha: positive(config, 'lora_alpha', Number.isFinite),
    rankPatterns: patterns(config, 'rank_pattern', isCount),
    alphaPatterns: patterns(config, 'alpha_pattern', Number.isFinite),
    usesRslora: flag(config, 'use_rslora'),
    usesDora: flag(config, 'use_dora'),
    hasBias: flag(config, 'lora_bias'),
    targets: parseTargets(config.target_modules),
    layers: parseLayers(config.layers_to_transform, dims?.numLayers ?? Number.POSITIVE_INFINITY),
  };
}

const isCount = (value: number) => Number.isSafeInteger(value);

function positive(config: Record<string, unknown>, name: string, is: (value: number) => boolean): number {
  const value = config[name];
  if (typeof value !== 'number' || !is(value) || value <= 0) refuse(name, 'a number above 0', shown(value));
  return value;
}

function flag(config: Record<string, unknown>, name: string): boolean {
  const value = config[name] ?? false;
  if (typeof value !== 'boolean') refuse(name, 'true or false', shown(value));
  return value;
}

function patterns(
  config: Record<string, unknown>,
  name: string,
  is: (value: number) => boolean,
): [string, number][] {
  const value = config[name] ?? {};
  if (typeof value !== 'object' || Array.isArray(value))
    refuse(name, 'an object from patterns to numbers', shown(value));
  return Object.entries(value as object).map(([pattern, number]) => {
    if (typeof number !== 'number' || !is(number) || number <= 0)
      refuse(`${name} ${shown(pattern)}`, 'a number above 0', shown(number));
    compilePattern(name, pattern);
    return [pattern, number];
  });
}

/**
 * A pattern as PEFT reads it: it must match the end of the module's name, at its start or after a dot. Patterns come
 * from strangers, so what could take exponential time to match is refused.
 */
function compilePattern(field: string, pattern: string): RegExp {
  const repeats = pattern.match(/[*+{]/g)?.length ?? 0;
  if (pattern.length > 256 || repeats > 3 || /\)[*+{]|\\[1-9k]|\(\?[=!<]/.test(pattern)) {
    refuse(
      `${field} ${shown(pattern)}`,
      'a short pattern without repeated groups, look-around or references',
      'another',
    );
  }
  try {
    return new RegExp(`^(.*\\.)?(${pattern})$`);
  } catch {
    return refuse(`${field} ${shown(pattern)}`, 'a regular expression', 'another text');
  }
}

function matchPatterns(entries: [string, number][], field: string, moduleName: string): number | null {
  const found = entries.find(([pattern]) => compilePattern(field, pattern).test(moduleName));
  return found?.[1] ?? null;
}

function parseTargets(value: unknown): string[] | null {
  if (value == null || typeof value === 'string') return null;
  if (!Array.isArray(value) || !value.every((target) => typeof target === 'string' && target !== '')) {
    refuse('target_modules', 'a list of names, a pattern or all-linear', shown(value));
  }
  return value as string[];
}

function parseLayers(value: unknown, numLayers: number): number[] | null {
  if (value == null || (Array.isArray(value) && value.length === 0)) return null;
  const layers = Array.isArray(value) ? value : [value];
  const wrong = layers.find((layer) => !Number.isInteger(layer) || layer < 0 || layer >= numLayers);
  if (wrong !== undefined) refuse('layers_to_transform', `layers from 0 to ${numLayers - 1}`, shown(wrong));
  return layers as number[];
}

/** The tensors of one target module. */
interface Parts {
  layer: number;
  target: TargetModule;
  /** As in the base model: `model.layers.0.self_attn.q_proj`. */
  moduleName: string;
  a?: SafetensorsTensor;
  b?: SafetensorsTensor;
  magnitude?: SafetensorsTensor;
  bias?: SafetensorsTensor;
}

function collectModules(file: SafetensorsFile, config: AdapterConfig, dims: ModelDims): AdapterModule[] {
  const byPlace = (a: Parts, b: Parts) =>
    a.layer - b.layer || targetModules.indexOf(a.target) - targetModules.indexOf(b.target);
  return collectParts(file, config)
    .sort(byPlace)
    .map((module) => toAdapterModule(module, config, dims));
}

function collectParts(file: SafetensorsFile, config: AdapterConfig): Parts[] {
  const parts = new Map<string, Parts>();
  for (const tensor of file.tensors.values()) {
    const { part, ...module } = parseTensorName(tensor.name);
    const known = parts.get(module.moduleName) ?? module;
    if (known[part] !== undefined)
      refuse(`tensor '${tensor.name}'`, 'one tensor for each part of a module', `also '${known[part].name}'`);
    parts.set(module.moduleName, { ...known, [part]: tensor });
  }
  if (parts.size === 0) refuse('adapter_model.safetensors', 'at least one tensor', 'none');
  checkCoverage([...parts.values()], config);
  return [...parts.values()];
}

const tensorName = new RegExp(
  '^base_model\\.model\\.(?<module>' +
    'lm_head|model\\.layers\\.(?<layer>0|[1-9]\\d{0,5})\\.' +
    '(?:self_attn\\.(?:q_proj|k_proj|v_proj|o_proj)|mlp\\.(?:gate_proj|up_proj|down_proj)))' +
    '\\.(?<part>lora_A(?:\\.default)?\\.weight|lora_B(?:\\.default)?\\.(?:weight|bias)|lora_magnitude_vector(?:\\.default)?(?:\\.weight)?)$',
);

function parseTensorName(name: string): Parts & { part: 'a' | 'b' | 'magnitude' | 'bias' } {
  if (/lora_embedding_[AB]/.test(name)) {
    refuse(
      `tensor '${shownName(name)}'`,
      'adapters of linear layers; embeddings are not supported',
      'lora_embedding',
    );
  }
  const groups = tensorName.exec(name)?.groups;
  if (groups === undefined) {
    refuse(
      `tensor '${shownName(name)}'`,
      `lora_A, lora_B or lora_magnitude_vector of ${targetModules.join(', ')}`,
      'another name',
    );
  }
  const { module, layer, part } = groups as { module: string; layer?: string; part: string };
  return {
    layer: layer === undefined ? -1 : Number(layer),
    target: module.split('.').at(-1) as TargetModule,
    moduleName: module,
    part: part.startsWith('lora_A')
      ? 'a'
      : part.startsWith('lora_m')
        ? 'magnitude'
        : part.endsWith('bias')
          ? 'bias'
          : 'b',
  };
}

const shownName = (name: string) => shown(name).slice(1, -1);

/** Every target and layer that the config lists has tensors, and only they have. */
function checkCoverage(parts: Parts[], config: AdapterConfig): void {
  for (const target of config.targets ?? []) {
    if (!parts.some(({ moduleName }) => moduleName === target || moduleName.endsWith(`.${target}`))) {
      refuse(`target_modules ${shown(target)}`, 'tensors for it', 'none');
    }
  }
  const isListed = ({ moduleName }: Parts) =>
    config.targets === null ||
    config.targets.some((target) => moduleName === target || moduleName.endsWith(`.${target}`));
  const stray = parts.find((module) => !isListed(module));
  if (stray !== undefined)
    refuse(`module '${stray.moduleName}'`, `one of target_modules ${shown(config.targets)}`, 'another');
  if (config.layers === null) return;
  const outside = parts.find(({ layer }) => layer >= 0 && !config.layers!.includes(layer));
  if (outside !== undefined)
    refuse(`module '${outside.moduleName}'`, `one of layers_to_transform ${shown(config.layers)}`, 'another');
  const empty = config.layers.find((layer) => !parts.some((module) => module.layer === layer));
  if (empty !== undefined) refuse(`layers_to_transform ${empty}`, 'tensors for it', 'none');
}

function toAdapterModule(module: Parts, config: AdapterConfig, dims: ModelDims): AdapterModule {
  const { layer, target, moduleName, magnitude, bias } = module;
  const field = `module '${moduleName}'`;
  if (layer >= dims.numLayers) refuse(field, `a layer below ${dims.numLayers}`, `${layer}`);
  const { a, b } = pairOf(module);
  if (config.usesDora !== (magnitude !== undefined)) {
    refuse(
      `${field} lora_magnitude_vector`,
      config.usesDora ? 'one, as use_dora is true' : 'none, as use_dora is false',
      magnitude ? 'one' : 'none',
    );
  }
  if (config.hasBias !== (bias !== undefined)) {
    refuse(
      `${field} lora_B.bias`,
      config.hasBias ? 'one, as lora_bias is true' : 'none, as lora_bias is false',
      bias ? 'one' : 'none',
    );
  }
  const { rank, alpha } = rankOf(moduleName, config);
  const [outFeatures, inFeatures] = moduleShape(target, dims);
  expectShape(a, [rank, inFeatures]);
  expectShape(b, [outFeatures, rank]);
  if (magnitude) expectShape(magnitude, [outFeatures]);
  if (bias) expectShape(bias, [outFeatures]);
  return {
    layer,
    target,
    rank,
    scaling: scalingOf(alpha, rank, config),
    type: elementType(a),
    aOffsetBytes: a.offsetBytes,
    bOffsetBytes: b.offsetBytes,
    magnitudeOffsetBytes: magnitude?.offsetBytes ?? -1,
    magnitudeType: magnitude ? elementType(magnitude) : 'f32',
    biasOffsetBytes: bias?.offsetBytes ?? -1,
    biasType: bias ? elementType(bias) : 'f32',
  };
}

function pairOf({ moduleName, a, b }: Parts): { a: SafetensorsTensor; b: SafetensorsTensor } {
  if (a === undefined || b === undefined) {
    refuse(`module '${moduleName}'`, 'lora_A and lora_B', a === undefined ? 'no lora_A' : 'no lora_B');
  }
  if (a.dtype !== b.dtype) refuse(`tensor '${b.name}' dtype`, `${a.dtype}, as lora_A has`, b.dtype);
  return { a, b };
}

function rankOf(moduleName: string, { rank, alpha, rankPatterns, alphaPatterns }: AdapterConfig) {
  return {
    rank: matchPatterns(rankPatterns, 'rank_pattern', moduleName) ?? rank,
    alpha: matchPatterns(alphaPatterns, 'alpha_pattern', moduleName) ?? alpha,
  };
}

function scalingOf(alpha: number, rank: number, { usesRslora }: AdapterConfig): number {
  return alpha / (usesRslora ? Math.sqrt(rank) : rank);
}

/** [outFeatures, inFeatures] of the base's projection. */
function moduleShape(target: TargetModule, dims: ModelDims): [number, number] {
  const { hiddenSize, intermediateSize, numHeads, numKvHeads, headDim, vocabSize } = dims;
  switch (target) {
    case 'q_proj':
      return [numHeads * headDim, hiddenSize];
    case 'k_proj':
    case 'v_proj':
      return [numKvHeads * headDim, hiddenSize];
    case 'o_proj':
      return [hiddenSize, numHeads * headDim];
    case 'gate_proj':
    case 'up_proj':
      return [intermediateSize, hiddenSize];
    case 'down_proj':
      return [hiddenSize, intermediateSize];
    case 'lm_head':
      return [vocabSize, hiddenSize];
  }
}

function expectShape(tensor: SafetensorsTensor, shape: number[]): void {
  if (tensor.shape.length !== shape.length || tensor.shape.some((size, i) => size !== shape[i])) {
    refuse(
      `tensor '${tensor.name}' shape`,
      `[${shape}] by the config and the base model`,
      `[${tensor.shape}]`,
    );
  }
}

export function elementType({ name, dtype }: SafetensorsTensor): 'f32' | 'f16' | 'bf16' {
  if (dtype === 'F32') return 'f32';
  if (dtype === 'F16') return 'f16';
  if (dtype === 'BF16') return 'bf16';
  return refuse(`tensor '${name}' dtype`, 'F32, F16 or BF16', dtype);
}

async function digestOf(file: SafetensorsFile, config: AdapterConfig): Promise<string> {
  // PEFT's own words, so that a rename here changes no digest. Patterns are pairs, as their order counts.
  const meaningful = {
    peft_type: 'LORA',
    r: config.rank,
    lora_alpha: config.alpha,
    rank_pattern: config.rankPatterns,
    alpha_pattern: config.alphaPatterns,
    use_rslora: config.usesRslora,
    use_dora: config.usesDora,
    lora_bias: config.hasBias,
  };
  const hash = createHash('sha256').update(canonicalJson(meaningful));
  const window = Buffer.alloc(1 << 20);
  const handle = await open(file.path);
  try {
    // Where the window begins in the file, and how much of it is filled. Tensors mostly lie in the order of their
    // names, so one read serves many of them.
    let windowOffset = 0;
    let windowBytes = 0;
    const byName = [...file.tensors.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
    for (const { name, dtype, shape, offsetBytes, sizeBytes } of byName) {
      hash.update(`\n${canonicalJson([name, dtype, shape])}\n`);
      for (let done = 0; done < sizeBytes; ) {
        let begin = offsetBytes + done - windowOffset;
        if (begin < 0 || begin >= windowBytes) {
          windowOffset = offsetBytes + done;
          windowBytes = (await handle.read(window, 0, window.length, windowOffset)).bytesRead;
          if (windowBytes === 0) refuse(`tensor '${name}'`, `${sizeBytes} bytes`, `${done}`);
          begin = 0;
        }
        const end = Math.min(windowBytes, begin + sizeBytes - done);
        hash.update(window.subarray(begin, end));
        done += end - begin;
      }
    }
  } finally {
    await handle.close();
  }
  return `sha256:${hash.digest('hex')}`;
}

/** JSON with keys in order, so that equal values are equal text. */
function canonicalJson(value: unknown): string {
  return JSON.stringify(value, (_key, item) =>
    item !== null && typeof item === 'object' && !Array.isArray(item)
      ? Object.fromEntries(Object.entries(item).sort(([a], [b]) => (a < b ? -1 : 1)))
      : item,
  );
}
