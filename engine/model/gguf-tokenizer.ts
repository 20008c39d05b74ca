/**
 * GGUF's tokenizer metadata as a tokenizer.json object. `gpt2` is byte-level BPE with merges; `llama` is SentencePiece
 * BPE, where a pair is merged if the whole is a token, the one of highest score first.
 */
import type { GgufValue } from '../../native/index.ts';
import { InputError, shown } from '../input-error.ts';
import { metadataReader, tokenTypes } from './gguf-metadata.ts';

export interface TokenizerDescription {
  /** The parts of a tokenizer.json that tokenizer.ts reads. */
  json: TokenizerJson;
  /** Text of each id; holes where a vocabulary has them. */
  pieces: string[];
  /** Instead of merges: the rank of each token that a merge may make, lower first. */
  mergeRanks: Map<string, number> | null;
  bosToken: string | null;
  eosToken: string | null;
}

export interface TokenizerJson {
  added_tokens?: AddedTokenJson[] | undefined;
  normalizer: unknown;
  pre_tokenizer: unknown;
  post_processor: unknown;
  decoder: unknown;
  /** Its vocabulary is taken from the description's pieces. */
  model: { type: string; merges?: unknown[]; [key: string]: unknown };
}

export interface AddedTokenJson {
  id: number;
  content: string;
  special?: boolean;
  lstrip?: boolean;
  rstrip?: boolean;
  single_word?: boolean;
}

const words = "'s|'t|'re|'ve|'m|'ll|'d";
const anyCaseWords = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])";
export const gpt2Pattern = `${words}| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+`;
const blanks = '\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+';
const otherRuns = ' ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*';

interface PreTokenizer {
  /** Applied one after another, each splitting the pieces of the one before. */
  patterns: string[];
  /** A word that is a token is that token, whatever the merges say. */
  ignoresMerges?: boolean;
  addsBos?: boolean;
  normalizesNfc?: boolean;
}

const llama3: PreTokenizer = {
  patterns: [`${anyCaseWords}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|${otherRuns}|${blanks}`],
  ignoresMerges: true,
  addsBos: true,
};
// The file does not say so, but the models' own tokenizer composes characters first.
const qwen2: PreTokenizer = {
  patterns: [`${anyCaseWords}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|${otherRuns}|${blanks}`],
  normalizesNfc: true,
};
const smollm: PreTokenizer = { patterns: ['\\p{N}', gpt2Pattern] };
const gpt2: PreTokenizer = { patterns: [gpt2Pattern] };
const tekken: PreTokenizer = {
  patterns: [
    '[^\\r\\n\\p{L}\\p{N}]?((?=[\\p{L}])([^a-z]))*((?=[\\p{L}])([^A-Z]))+|' +
      '[^\\r\\n\\p{L}\\p{N}]?((?=[\\p{L}])([^a-z]))+((?=[\\p{L}])([^A-Z]))*|' +
      `\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|${blanks}`,
  ],
  ignoresMerges: true,
};
const unnamed: PreTokenizer = {
  patterns: ['[\\p{P}\\$\\+<=>\\^~\\|]+', gpt2Pattern, '\\p{N}+', '[0-9][0-9][0-9]'],
};

/** By the value of tokenizer.ggml.pre; names and patterns are llama.cpp's. */
const preTokenizers: Record<string, PreTokenizer> = {
  default: unnamed,
  'gpt-2': gpt2,
  smollm,
  'llama-bpe': llama3,
  llama3,
  'llama-v3': llama3,
  qwen2,
  'deepseek-r1-qwen': qwen2,
  tekken,
};

/** @throws InputError tokenizer_invalid naming the key */
export function describeGgufTokenizer(metadata: Record<string, GgufValue>): TokenizerDescription {
  const { text, strings, numbers, count } = metadataReader(metadata);
  const model = text('tokenizer.ggml.model');
  const tokens = strings('tokenizer.ggml.tokens');
  const types = numbers('tokenizer.ggml.token_type', new Float64Array(tokens.length));
  if (types.length !== tokens.length) {
    refuse('tokenizer.ggml.token_type', `${tokens.length} types, one per token`, `${types.length}`);
  }
  const named = (key: string): string | null => {
    const id = count(`tokenizer.ggml.${key}_token_id`, -1);
    return id < 0
      ? null
      : (tokens[id] ?? refuse(`tokenizer.ggml.${key}_token_id`, `below ${tokens.length}`, `${id}`));
  };
  const [bosToken, eosToken] = [named('bos'), named('eos')];
  const added = tokens.flatMap((content, id): AddedTokenJson[] => {
    const special = types[id] === tokenTypes.control || types[id] === tokenTypes.unknown;
    return content !== '' && (special || types[id] === tokenTypes.userDefined)
      ? [{ id, content, special }]
      : [];
  });
  const common = { pieces: tokens, bosToken, eosToken };
  switch (model) {
    case 'gpt2': {
      const { json, addsBos } = byteLevel(metadata, added);
      json.post_processor = endsOf(metadata, addsBos, bosToken, eosToken);
      return { ...common, json, mergeRanks: null };
    }
    case 'llama': {
      const json = sentencePiece(metadata, tokens, added, named('unknown'));
      json.post_processor = endsOf(metadata, true, bosToken, eosToken);
      return { ...common, json, mergeRanks: ranksByScore(tokens, numbers('tokenizer.ggml.scores')) };
    }
    default:
      return refuse(
        'tokenizer.ggml.model',
        'gpt2 (byte-level BPE) or llama (SentencePiece BPE)',
        shown(model),
      );
  }
}

type Metadata = Record<string, GgufValue>;

function byteLevel(metadata: Metadata, added: AddedTokenJson[]): { json: TokenizerJson; addsBos: boolean } {
  const { text, strings, flag } = metadataReader(metadata);
  const pre = text('tokenizer.ggml.pre', 'default');
  const known = Object.hasOwn(preTokenizers, pre) ? preTokenizers[pre]! : null;
  if (known === null)
    return refuse('tokenizer.ggml.pre', `one of ${Object.keys(preTokenizers).join(', ')}`, shown(pre));
  const splits = known.patterns.map((Regex) => ({
    type: 'Split',
    pattern: { Regex },
    behavior: 'Isolated',
    invert: false,
  }));
  const bytes = {
    type: 'ByteLevel',
    add_prefix_space: flag('tokenizer.ggml.add_space_prefix', false),
    use_regex: false,
  };
  const json: TokenizerJson = {
    added_tokens: added,
    normalizer: known.normalizesNfc ? { type: 'NFC' } : null,
    pre_tokenizer: { type: 'Sequence', pretokenizers: [...splits, bytes] },
    post_processor: null,
    decoder: { type: 'ByteLevel' },
    model: {
      type: 'BPE',
      merges: strings('tokenizer.ggml.merges').map(splitMerge),
      ignore_merges: known.ignoresMerges ?? false,
    },
  };
  return { json, addsBos: known.addsBos ?? false };
}

function splitMerge(merge: string): [string, string] {
  const at = merge.indexOf(' ', 1);
  if (at < 0) refuse('tokenizer.ggml.merges', 'two parts with a blank between', shown(merge));
  return [merge.slice(0, at), merge.slice(at + 1)];
}

function sentencePiece(
  metadata: Metadata,
  tokens: string[],
  added: AddedTokenJson[],
  unknown: string | null,
): TokenizerJson {
  const escapeBlanks = { type: 'Replace', pattern: { String: ' ' }, content: '▁' };
  const addsBlank = metadataReader(metadata).flag('tokenizer.ggml.add_space_prefix', true);
  const strip = { type: 'Strip', content: ' ', start: 1, stop: 0 };
  return {
    added_tokens: added,
    normalizer: addsBlank
      ? { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: '▁' }, escapeBlanks] }
      : escapeBlanks,
    pre_tokenizer: canSplitWords(tokens) ? cutBeforeBlanks : null,
    post_processor: null,
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        ...(addsBlank ? [strip] : []),
      ],
    },
    model: { type: 'BPE', merges: [], byte_fallback: true, unk_token: unknown, ignore_merges: false },
  };
}

/** Whether text may be cut before each blank without changing what is merged: no token has a blank after a letter. */
export const canSplitWords = (tokens: string[]) => !tokens.some((token) => /[^▁]▁/.test(token));
export const cutBeforeBlanks = {
  type: 'Split',
  pattern: { Regex: '▁*[^▁]+|▁+' },
  behavior: 'Isolated',
  invert: false,
};

/** Higher scores first; equal scores are equal ranks, and then the leftmost pair is merged first. */
function ranksByScore(tokens: string[], scores: Float64Array): Map<string, number> {
  if (scores.length !== tokens.length)
    refuse('tokenizer.ggml.scores', `${tokens.length} scores`, `${scores.length}`);
  const distinct = [...new Set(scores)].sort((a, b) => b - a);
  const rankOfScore = new Map(distinct.map((score, rank) => [score, rank]));
  return new Map(tokens.map((token, id) => [token, rankOfScore.get(scores[id]!)!]));
}

/** What encoding adds before and after a text. */
function endsOf(metadata: Metadata, addsBos: boolean, bos: string | null, eos: string | null): unknown {
  const { flag } = metadataReader(metadata);
  const special = (token: string | null, isOn: boolean) =>
    token !== null && isOn ? [{ SpecialToken: { id: token } }] : [];
  return {
    type: 'TemplateProcessing',
    single: [
      ...special(bos, flag('tokenizer.ggml.add_bos_token', addsBos)),
      { Sequence: { id: 'A' } },
      ...special(eos, flag('tokenizer.ggml.add_eos_token', false)),
    ],
    pair: [],
  };
}

function refuse(field: string, expected: string, got: string): never {
  throw new InputError('tokenizer_invalid', `${field}: expected ${expected}, got ${got}`);
}
