/**
 * Text to token ids and back. Merging, normalising and splitting words are @huggingface/tokenizers'; here are the parts
 * that serving needs differently: special tokens may be left as text, merges are looked up without building a key string
 * for each, and decoding is over bytes, so that it can be done token by token in linear time.
 */
import { Tokenizer as HubTokenizer } from '@huggingface/tokenizers';
import { InputError, shown } from '../input-error.ts';
import {
  type AddedTokenJson,
  canSplitWords,
  cutBeforeBlanks,
  describeGgufTokenizer,
  gpt2Pattern,
  type TokenizerDescription,
  type TokenizerJson,
} from './gguf-tokenizer.ts';
import { readJson } from './hf-folder.ts';
import type { TokenizerSource } from './source-model.ts';

/** @throws InputError tokenizer_invalid naming the file and field */
export async function loadTokenizer(source: TokenizerSource): Promise<Tokenizer> {
  try {
    const description =
      source.kind === 'gguf' ? describeGgufTokenizer(source.metadata) : await describeFolder(source.path);
    return new Tokenizer(description);
  } catch (error) {
    if (error instanceof InputError && error.code === 'io_failed') throw error;
    const { message } = error as Error;
    throw new InputError('tokenizer_invalid', `tokenizer of ${source.path}: ${message}`, { cause: error });
  }
}

async function describeFolder(folder: string): Promise<TokenizerDescription> {
  const json = (await readJson(folder, 'tokenizer.json')) as TokenizerJson | null;
  if (json === null) refuse('tokenizer.json', 'a file', 'none (tokenizer.model alone is not read)');
  const { vocab, ...model } = (json.model ?? {}) as {
    vocab?: Record<string, number>;
    type?: string;
    merges?: unknown[];
  };
  if ((model.type ?? 'BPE') !== 'BPE' || !Array.isArray(model.merges))
    refuse('tokenizer.json model', 'BPE with merges', shown(model.type));
  const config = (await readJson(folder, 'tokenizer_config.json')) ?? {};
  const text = (value: unknown): string | null =>
    typeof value === 'string' ? value : ((value as { content?: string } | null)?.content ?? null);

  const pieces: string[] = [];
  for (const [piece, id] of Object.entries(vocab ?? {})) pieces[checkId(id, piece)] = piece;
  const cutsNothing = json.pre_tokenizer == null || isSplitAtBlanks(json.pre_tokenizer);
  const canCut = cutsNothing && writesBlanks(json.normalizer) && canSplitWords(pieces);
  return {
    json: {
      added_tokens: json.added_tokens,
      normalizer: json.normalizer ?? null,
      pre_tokenizer: canCut ? cutBeforeBlanks : asRustSplits(json.pre_tokenizer, canSplitWords(pieces)),
      post_processor: json.post_processor ?? null,
      decoder: json.decoder ?? null,
      model: { ...model, type: 'BPE' },
    },
    pieces,
    mergeRanks: null,
    bosToken: text(config.bos_token),
    eosToken: text(config.eos_token),
  };
}

type Part = { type?: string; [key: string]: unknown } | null;

/** Gemma's splitter: at blanks, of which its normaliser has left none. */
function isSplitAtBlanks(part: unknown): boolean {
  const { type, pattern } = part as { type?: string; pattern?: { String?: string } };
  return type === 'Split' && pattern?.String === ' ';
}

const writesBlanks = (part: unknown): boolean => {
  const { type, content, normalizers } = (part ?? {}) as {
    type?: string;
    content?: string;
    normalizers?: unknown[];
  };
  return (
    (type === 'Replace' && content === '▁') || (type === 'Sequence' && (normalizers ?? []).some(writesBlanks))
  );
};

/**
 * The same splits, in the one form that the library translates from Rust's regular expressions: its built-in patterns of
 * ByteLevel and Digits use JavaScript's notion of blanks and ASCII's of digits, and its Metaspace does not split.
 */
function asRustSplits(part: unknown, canCut: boolean): Part {
  const value = (part ?? null) as Part;
  const split = (Regex: string) => ({
    type: 'Split',
    pattern: { Regex },
    behavior: 'Isolated',
    invert: false,
  });
  switch (value?.type) {
    case 'Sequence':
      return {
        ...value,
        pretokenizers: (value.pretokenizers as unknown[]).map((one) => asRustSplits(one, canCut)),
      };
    case 'Digits':
      return split(value.individual_digits === true ? '\\p{N}' : '\\p{N}+');
    case 'ByteLevel': {
      if (value.use_regex === false) return value;
      // A prefix blank is put in front before the split: as Metaspace does it, with a blank for its mark.
      const prefix = { type: 'Metaspace', replacement: ' ', prepend_scheme: 'always' };
      const spell = { ...value, add_prefix_space: false, use_regex: false };
      const first = value.add_prefix_space === true ? [prefix] : [];
      return { type: 'Sequence', pretokenizers: [...first, split(gpt2Pattern), spell] };
    }
    case 'Metaspace': {
      const scheme = value.prepend_scheme ?? (value.add_prefix_space === false ? 'never' : 'always');
      const metaspace = { ...value, prepend_scheme: scheme };
      if (value.split !== false) return { type: 'Sequence', pretokenizers: [metaspace, split('▁?[^▁]+|▁')] };
      return canCut ? { type: 'Sequence', pretokenizers: [metaspace, cutBeforeBlanks] } : metaspace;
    }
    default:
      return value;
  }
}

/** What is used of the library: its parts, and of its model the look-ups. */
interface Hub {
  normalizer: ((text: string) => string) | null;
  pre_tokenizer: ((text: string, options: { section_index: number }) => string[]) | null;
  post_processor: ((tokens: string[], pair: null, addsSpecial: boolean) => { tokens: string[] }) | null;
  model: ((words: string[]) => string[]) & {
    tokens_to_ids: Map<string, number>;
    unk_token: string | null | undefined;
    unk_token_id: number | undefined;
    add_node: (queue: { push(symbol: Symbol): void }, symbol: Symbol) => void;
  };
}

/** How a token's text stands for bytes. */
type PieceKind = 'byteLevel' | 'sentencePiece';

/** Words whose ids are remembered, and how long they may be. Text repeats itself: this saves most of the merging. */
const maxCachedWords = 50_000;
const maxCachedLength = 64;

export class Tokenizer {
  readonly bosToken: string | null;
  readonly eosToken: string | null;
  /** Highest id plus one. The model's own vocabulary may be padded beyond it. */
  readonly vocabSize: number;
  readonly #hub: Hub;
  readonly #pieces: string[];
  readonly #added: Map<number, AddedTokenJson>;
  readonly #specialTrie: TrieNode;
  readonly #plainTrie: TrieNode;
  readonly #kind: PieceKind;
  /** Words are spelled in bytes by us, after the look-up in the cache. */
  readonly #spellsBytes: boolean;
  readonly #stripsFirstBlank: boolean;
  readonly #prefixIds: number[];
  readonly #suffixIds: number[];
  readonly #idsOfWords = new Map<string, number[]>();
  /** By id; at most one an id of the vocabulary. */
  readonly #shares = new Map<number, string | Uint8Array>();

  constructor({ json, pieces, mergeRanks, bosToken, eosToken }: TokenizerDescription) {
    this.bosToken = bosToken;
    this.eosToken = eosToken;
    const added = json.added_tokens ?? [];
    const { splits, spellsBytes } = withoutByteLevel(json.pre_tokenizer);
    this.#spellsBytes = spellsBytes;
    // Vocabulary and merges are set below, added tokens are found here, so the library gets none of them.
    const model = { ...json.model, vocab: {}, merges: [] };
    this.#hub = new HubTokenizer(
      { ...json, pre_tokenizer: splits, added_tokens: [], model },
      {},
    ) as unknown as Hub;
    this.#pieces = [...pieces];
    for (const { id, content } of added) this.#pieces[checkId(id, content)] = content;
    this.vocabSize = this.#pieces.length;
    setVocabulary(this.#hub.model, pieces);
    setMergeRanks(
      this.#hub.model,
      mergeRanks === null ? ranksOfPairs(json.model.merges ?? []) : (a, b) => mergeRanks.get(a + b),
    );

    this.#added = new Map(added.map((token) => [token.id, token]));
    this.#specialTrie = buildTrie(added);
    this.#plainTrie = buildTrie(added.filter((token) => !token.special));
    ({ kind: this.#kind, stripsFirstBlank: this.#stripsFirstBlank } = decoderKind(json.decoder));

    // What is put around a text, by asking for a text of one token that cannot be.
    const mark = '\u0000text';
    const around = this.#hub.post_processor?.([mark], null, true).tokens ?? [mark];
    const ids = around.map((token) => (token === mark ? -1 : this.#idOf(token)));
    this.#prefixIds = ids.slice(0, ids.indexOf(-1));
    this.#suffixIds = ids.slice(ids.indexOf(-1) + 1);
  }

  /**
   * @param addSpecialTokens put the model's begin token (or others) around the text
   * @param parseSpecial read special tokens that the text spells as such; off, they are plain text
   */
  encode(text: string, options: { addSpecialTokens?: boolean; parseSpecial?: boolean } = {}): number[] {
    const { addSpecialTokens = true, parseSpecial = true } = options;
    const sections = splitAdded(text.toWellFormed(), parseSpecial ? this.#specialTrie : this.#plainTrie);
    const ids = addSpecialTokens ? [...this.#prefixIds] : [];
    for (const [index, section] of sections.entries()) {
      if (typeof section === 'string') this.#encodePlain(section, index, ids);
      else ids.push(section.id);
    }
    if (addSpecialTokens) ids.push(...this.#suffixIds);
    return ids;
  }

  #encodePlain(text: string, sectionIndex: number, ids: number[]): void {
    const { normalizer, pre_tokenizer: preTokenizer } = this.#hub;
    const normalized = normalizer === null ? text : normalizer(text);
    if (normalized.length === 0) return;
    const words =
      preTokenizer === null ? [normalized] : preTokenizer(normalized, { section_index: sectionIndex });
    for (const word of words) {
      for (const id of this.#idsOfWords.get(word) ?? this.#encodeWord(word)) ids.push(id);
    }
  }

  #encodeWord(word: string): number[] {
    const { model } = this.#hub;
    const ids: number[] = [];
    for (const token of model([this.#spellsBytes ? byteLevelText(word) : word])) {
      const id = model.tokens_to_ids.get(token) ?? model.unk_token_id;
      if (id !== undefined) ids.push(id);
    }
    if (word.length <= maxCachedLength) {
      if (this.#idsOfWords.size === maxCachedWords) this.#idsOfWords.clear();
      this.#idsOfWords.set(word, ids);
    }
    return ids;
  }

  #idOf(token: string): number {
    const added = [...this.#added.values()].find(({ content }) => content === token);
    const id = added?.id ?? this.#hub.model.tokens_to_ids.get(token);
    if (id === undefined) refuse('post_processor', 'tokens of the vocabulary', shown(token));
    return id;
  }

  /** Bytes that are no UTF-8 become U+FFFD. */
  decode(ids: ArrayLike<number>, { skipSpecialTokens = true }: { skipSpecialTokens?: boolean } = {}): string {
    const detokenizer = this.createDetokenizer({ skipSpecialTokens });
    let text = '';
    for (let i = 0; i < ids.length; i++) text += detokenizer.push(ids[i]!);
    text += detokenizer.flush();
    return this.#stripsFirstBlank && text.startsWith(' ') ? text.slice(1) : text;
  }

  /** Decodes token by token. What it returns never holds a part of a character; together it is the whole text. */
  createDetokenizer({ skipSpecialTokens = true }: { skipSpecialTokens?: boolean } = {}): Detokenizer {
    return new Detokenizer((id) => (skipSpecialTokens && this.isSpecial(id) ? '' : this.#shareOf(id)));
  }

  /** Kept, as it is asked for every token that is drawn. */
  #shareOf(id: number): string | Uint8Array {
    let share = this.#shares.get(id);
    if (share === undefined && this.#pieces[id] === undefined) return '';
    if (share === undefined) {
      share = wholeCharacters(this.tokenBytes(id));
      this.#shares.set(id, share);
    }
    return share;
  }

  isSpecial(id: number): boolean {
    return this.#added.get(id)?.special === true;
  }

  /** The bytes that a token stands for in text; none for an id that the tokenizer does not have. */
  tokenBytes(id: number): Uint8Array {
    const piece = this.#pieces[id];
    if (piece === undefined) return noBytes;
    if (this.#kind === 'byteLevel') return this.#added.has(id) ? utf8.encode(piece) : byteLevelBytes(piece);
    const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(piece);
    return byte ? Uint8Array.of(Number.parseInt(byte[1]!, 16)) : utf8.encode(piece.replaceAll('▁', ' '));
  }
}

export class Detokenizer {
  readonly #shareOf: (id: number) => string | Uint8Array;
  /** Holds back the bytes of a character that is not complete. A byte order mark is text like any other. */
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true });

  /** The decoder may hold bytes back. Whole characters begin anew, whatever it holds, and leave nothing. */
  #mayHold = false;

  /** @param shareOf  a token's share of the text: a string when it is whole characters, else bytes */
  constructor(shareOf: (id: number) => string | Uint8Array) {
    this.#shareOf = shareOf;
  }

  push(id: number): string {
    const share = this.#shareOf(id);
    const isWhole = typeof share === 'string';
    if (isWhole && (!this.#mayHold || share === '')) return share;
    this.#mayHold = !isWhole;
    return this.#decoder.decode(isWhole ? utf8.encode(share) : share, streaming);
  }

  /** What was held back, as U+FFFD. The detokenizer is then as new. */
  flush(): string {
    this.#mayHold = false;
    return this.#decoder.decode();
  }
}

const streaming = { stream: true };
const strict = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

function wholeCharacters(bytes: Uint8Array): string | Uint8Array {
  try {
    return strict.decode(bytes);
  } catch {
    return bytes;
  }
}

const utf8 = new TextEncoder();
const noBytes = new Uint8Array();

/** GPT-2's alphabet: printable characters stand for their own byte, the rest for the characters from U+0100 on. */
const byteOfCharacter = (() => {
  const isPrintable = (byte: number) =>
    (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 255 && byte !== 173);
  const map = new Map<string, number>();
  let next = 256;
  for (let byte = 0; byte < 256; byte++)
    map.set(String.fromCharCode(isPrintable(byte) ? byte : next++), byte);
  return map;
})();

const characterOfByte = Array.from({ length: 256 }, () => '');
for (const [character, byte] of byteOfCharacter) characterOfByte[byte] = character;

function byteLevelText(word: string): string {
  let text = '';
  for (const byte of utf8.encode(word)) text += characterOfByte[byte];
  return text;
}

/** The pre-tokenizer up to a final ByteLevel that only spells words in its alphabet. */
function withoutByteLevel(preTokenizer: unknown): { splits: unknown; spellsBytes: boolean } {
  const flat = flatten(preTokenizer as Part);
  const last = flat.at(-1);
  const onlySpells = last?.type === 'ByteLevel' && last.use_regex === false && last.add_prefix_space !== true;
  if (!onlySpells) return { splits: preTokenizer, spellsBytes: false };
  const splits = flat.slice(0, -1);
  return {
    splits: splits.length === 0 ? null : { type: 'Sequence', pretokenizers: splits },
    spellsBytes: true,
  };
}

const flatten = (part: Part): NonNullable<Part>[] =>
  part === null ? [] : part.type === 'Sequence' ? (part.pretokenizers as Part[]).flatMap(flatten) : [part];

function byteLevelBytes(piece: string): Uint8Array {
  const bytes = Array.from(piece, (character) => byteOfCharacter.get(character));
  // A token outside the alphabet stands for its own text, as in the Rust decoder.
  return bytes.includes(undefined) ? utf8.encode(piece) : Uint8Array.from(bytes as number[]);
}

function decoderKind(decoder: unknown): { kind: PieceKind; stripsFirstBlank: boolean } {
  const {
    type,
    decoders,
    prepend_scheme: scheme,
    add_prefix_space: addsBlank,
  } = (decoder ?? {}) as {
    type?: string;
    decoders?: { type?: string; content?: string; start?: number }[];
    prepend_scheme?: string;
    add_prefix_space?: boolean;
  };
  const parts = type === 'Sequence' ? (decoders ?? []) : [];
  if (type === 'ByteLevel' || parts.some((part) => part.type === 'ByteLevel')) {
    return { kind: 'byteLevel', stripsFirstBlank: false };
  }
  if (type === 'Metaspace') {
    return { kind: 'sentencePiece', stripsFirstBlank: scheme !== 'never' && addsBlank !== false };
  }
  if (parts.some((part) => part.type === 'ByteFallback' || part.type === 'Replace')) {
    const strip = parts.find((part) => part.type === 'Strip' && part.content === ' ');
    return { kind: 'sentencePiece', stripsFirstBlank: strip?.start === 1 };
  }
  return refuse(
    'tokenizer.json decoder',
    'ByteLevel, Metaspace, or a Sequence with ByteFallback',
    shown(decoder),
  );
}

function checkId(id: unknown, piece: string): number {
  // 2^24 ids: far above any vocabulary, and a bound on the table they index.
  if (!Number.isInteger(id) || (id as number) < 0 || (id as number) >= 2 ** 24) {
    refuse(`id of token ${shown(piece)}`, 'an integer from 0 to 16777215', shown(id));
  }
  return id as number;
}

type RankOf = (left: string, right: string) => number | undefined;

function ranksOfPairs(merges: unknown[]): RankOf {
  const ranks = new Map<string, Map<string, number>>();
  for (const [rank, merge] of merges.entries()) {
    const pair = typeof merge === 'string' ? merge.split(' ', 2) : merge;
    const [left, right] = Array.isArray(pair) ? pair : [];
    if (typeof left !== 'string' || typeof right !== 'string') {
      refuse('tokenizer.json model.merges', 'pairs of strings', shown(merge));
    }
    let ofLeft = ranks.get(left);
    if (ofLeft === undefined) {
      ofLeft = new Map();
      ranks.set(left, ofLeft);
    }
    ofLeft.set(right, rank);
  }
  return (left, right) => ranks.get(left)?.get(right);
}

interface Symbol {
  token: string;
  bias: number;
  next: { token: string };
  score: number;
}

/**
 * Replaces the library's look-up of a pair, which makes a JSON string of each pair it meets (and one of every merge at the
 * start). The queue takes the lowest score first; `bias`, below 1, is the place in the word.
 */
function setMergeRanks(model: Hub['model'], rankOf: RankOf): void {
  model.add_node = (queue, symbol) => {
    const rank = rankOf(symbol.token, symbol.next.token);
    if (rank === undefined) return;
    symbol.score = rank + symbol.bias;
    queue.push(symbol);
  };
}

/** The library's own way goes over an object of all tokens several times: seconds for 262 144 of them. */
function setVocabulary(model: Hub['model'], pieces: string[]): void {
  // forEach leaves out the holes of the array.
  pieces.forEach((piece, id) => {
    model.tokens_to_ids.set(piece, id);
  });
  model.unk_token_id = model.unk_token == null ? undefined : model.tokens_to_ids.get(model.unk_token);
}

interface TrieNode {
  next: Map<string, TrieNode>;
  token: AddedTokenJson | null;
}

function buildTrie(tokens: AddedTokenJson[]): TrieNode {
  const root: TrieNode = { next: new Map(), token: null };
  for (const token of tokens) {
    let node = root;
    for (let i = 0; i < token.content.length; i++) {
      let child = node.next.get(token.content[i]!);
      if (child === undefined) {
        child = { next: new Map(), token: null };
        node.next.set(token.content[i]!, child);
      }
      node = child;
    }
    if (node !== root) node.token = token;
  }
  return root;
}

/** Cuts the text at added tokens: the leftmost first, the longest of those that begin at one place. */
function splitAdded(text: string, root: TrieNode): (string | AddedTokenJson)[] {
  const sections: (string | AddedTokenJson)[] = [];
  let start = 0;
  for (let at = 0; at < text.length; ) {
    const token = longestAt(text, at, root);
    if (token === null) {
      at++;
      continue;
    }
    let before = text.slice(start, at);
    if (token.lstrip) before = before.trimEnd();
    if (before !== '') sections.push(before);
    sections.push(token);
    at += token.content.length;
    while (token.rstrip && /\s/.test(text[at] ?? 'x')) at++;
    start = at;
  }
  if (start < text.length) sections.push(text.slice(start));
  return sections;
}

function longestAt(text: string, at: number, root: TrieNode): AddedTokenJson | null {
  let found: AddedTokenJson | null = null;
  let node = root.next.get(text[at]!);
  for (let end = at + 1; node !== undefined; end++) {
    if (node.token !== null && !(node.token.single_word && !isWordAlone(text, at, end))) found = node.token;
    node = node.next.get(text[end] ?? '');
  }
  return found;
}

const isWordAlone = (text: string, begin: number, end: number) =>
  !/[\p{L}\p{N}_]/u.test(text[begin - 1] ?? ' ') && !/[\p{L}\p{N}_]/u.test(text[end] ?? ' ');

function refuse(field: string, expected: string, got: string): never {
  throw new InputError('tokenizer_invalid', `${field}: expected ${expected}, got ${got}`);
}
