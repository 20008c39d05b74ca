/**
 * Compiled grammars, by their text: all adapters share the base's tokens, so they share these. The vocabulary is made
 * when the first grammar is wanted. Compiling runs off this thread, a few at a time; what is kept is bounded, and the one that was
 * longest unused leaves.
 */
import { createHash } from 'node:crypto';
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { compileGrammar, Grammar, openVocabulary, Vocabulary } from '../../native/index.ts';
import { EngineError } from '../errors.ts';
import type { GrammarSource } from './output-format.ts';

export interface GrammarLibrary {
  openVocabulary: typeof openVocabulary;
  compileGrammar: typeof compileGrammar;
}

/** What grammars need of a tokenizer. */
export interface GrammarTokens {
  readonly vocabSize: number;
  readonly eosTokenIds: ReadonlySet<number>;
  /** The bytes that a token stands for; special tokens as their text. */
  tokenBytes(tokenId: number): Uint8Array;
  isSpecial(tokenId: number): boolean;
}

const maxKept = 256;
const maxKeptCharacters = 4 * 2 ** 20;
const maxCompiling = 2;
const maxQueued = 64;
const tokensPerTurn = 4096;

interface Kept {
  grammar: Promise<Grammar>;
  numCharacters: number;
}

export class Grammars {
  readonly #library: GrammarLibrary;
  readonly #tokens: GrammarTokens;
  readonly #onCompiled: (seconds: number, isGood: boolean) => void;
  readonly #now: () => number;
  /** The longest unused first. */
  readonly #kept = new Map<string, Kept>();
  #numKeptCharacters = 0;
  #vocabulary: Promise<Vocabulary> | null = null;
  #numCompiling = 0;
  readonly #queue: (() => void)[] = [];

  /** @param options.now  milliseconds, never going back */
  constructor(options: {
    library: GrammarLibrary;
    tokens: GrammarTokens;
    now: () => number;
    onCompiled: (seconds: number, isGood: boolean) => void;
  }) {
    this.#library = options.library;
    this.#tokens = options.tokens;
    this.#now = options.now;
    this.#onCompiled = options.onCompiled;
  }

  get numKept(): number {
    return this.#kept.size;
  }

  /** @throws EngineError invalid_value, naming the source's field, when it cannot be followed; overloaded */
  async get(source: GrammarSource): Promise<Grammar> {
    const key = createHash('sha256').update(`${source.kind}\n${source.text}`).digest('base64');
    let kept = this.#kept.get(key);
    if (kept) {
      this.#kept.delete(key);
      this.#kept.set(key, kept);
    } else {
      if (this.#queue.length >= maxQueued) {
        throw new EngineError('overloaded', `${maxQueued} grammars wait to be compiled; retry later`);
      }
      kept = { grammar: this.#compile(source), numCharacters: source.text.length };
      this.#keep(key, kept);
    }
    try {
      return await kept.grammar;
    } catch (error) {
      if ((error as { code?: unknown }).code !== 'grammar_invalid') throw error;
      const message = `${source.field}: expected one that outputs can be made to follow, got: ${(error as Error).message}`;
      throw new EngineError('invalid_value', message, { param: source.field, cause: error });
    }
  }

  #keep(key: string, kept: Kept): void {
    this.#kept.set(key, kept);
    this.#numKeptCharacters += kept.numCharacters;
    kept.grammar.catch(() => this.#drop(key, kept));
    for (const [oldest, { numCharacters }] of this.#kept) {
      if (this.#kept.size <= maxKept && this.#numKeptCharacters <= maxKeptCharacters) return;
      this.#kept.delete(oldest);
      this.#numKeptCharacters -= numCharacters;
    }
  }

  /** Whoever asks for it again has it tried again. */
  #drop(key: string, kept: Kept): void {
    if (this.#kept.get(key) !== kept) return;
    this.#kept.delete(key);
    this.#numKeptCharacters -= kept.numCharacters;
  }

  async #compile({ kind, text }: GrammarSource): Promise<Grammar> {
    if (this.#numCompiling < maxCompiling) this.#numCompiling++;
    // Whoever is done hands on its place.
    else await new Promise<void>((resolve) => this.#queue.push(resolve));
    let isGood = false;
    let beganMs = this.#now();
    try {
      this.#vocabulary ??= this.#openVocabulary();
      const vocabulary = await this.#vocabulary;
      beganMs = this.#now();
      const grammar = await this.#library.compileGrammar(vocabulary, kind, text);
      isGood = true;
      return grammar;
    } finally {
      this.#onCompiled((this.#now() - beganMs) / 1000, isGood);
      const next = this.#queue.shift();
      if (next) next();
      else this.#numCompiling--;
    }
  }

  /** In turns, so that steps go on. */
  async #openVocabulary(): Promise<Vocabulary> {
    const { vocabSize, eosTokenIds } = this.#tokens;
    const parts: Uint8Array[] = [];
    const ends = new Int32Array(vocabSize);
    let end = 0;
    for (let id = 0; id < vocabSize; id++) {
      if (id % tokensPerTurn === tokensPerTurn - 1) await nextTurn();
      const bytes = this.#tokens.tokenBytes(id);
      if (bytes.length > 0 && this.#tokens.isSpecial(id)) {
        parts.push(Uint8Array.of(0xff), bytes);
        end += 1 + bytes.length;
      } else {
        parts.push(bytes);
        end += bytes.length;
      }
      ends[id] = end;
    }
    return this.#library.openVocabulary(Buffer.concat(parts), ends, Int32Array.from(eosTokenIds));
  }
}
