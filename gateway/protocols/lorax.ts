// LoRAX's and TGI's own protocol in terms of OpenAI completions: a request becomes one that engines know, and their answer becomes
// one that these clients know. Pure. What would change the output and cannot be honoured is refused by name.
//
//   /generate          {inputs, parameters} → {generated_text, details?}
//   /generate_stream   the same → one event a token, {token, generated_text, details}; the last two are null but in the last event
//   /                  either, as `stream` says; whole answers are in a list
//   /embed             lorax-embed.ts
//
// Errors are {error, error_type}, and what is wrong with a request is 422 here.
// Source: predibase/lorax, router/src/lib.rs and server.rs; clients/python/lorax/types.py.

import { z } from 'zod';
import { enginePaths, type MergeRule, majoritySigns, readAdapters } from '../../engine/protocol.ts';
import { type ErrorCode, GatewayError } from '../errors.ts';
import type { Translation } from '../forward.ts';
import { acceptAdapters } from '../groups/composition.ts';
import type { Asked } from '../openai.ts';

export type LoraxRequest = {
  /** Of the engine. */
  path: string;
  asked: Asked;
  body: Buffer;
  translation: Translation;
};

/** Without `max_new_tokens`, as TGI has it. */
const defaultNewTokens = 100;

/** Possible values beside those that change nothing: null, false and absence. */
const refused: Record<string, string> = {
  adapter_source: 'expected none: adapters are declared with their source, and adapter_id is a declared name',
  api_token: "expected none: sources are read with the platform's own secrets",
  truncate: 'expected none: shorten the inputs before sending them',
  typical_p: 'expected none: pass top_p instead',
  watermark: 'expected false: outputs are not marked',
  decoder_input_details: 'expected false: inputs have no logprobs',
  return_k_alternatives: 'expected none: use logprobs of /v1/completions',
  frequency_penalty: 'expected none: use /v1/completions',
};

const strategies = ['linear', 'ties', 'dare_linear', 'dare_ties'] as const;

/** Of every body: who is to answer. */
export const adapterParameters = {
  adapter_id: z.string().nullish(),
  merged_adapters: z
    .object({
      ids: z.array(z.string()),
      weights: z.array(z.number()).nullish(),
      merge_strategy: z.enum(strategies).nullish(),
      // As LoRAX has it, linear takes no notice of what others need.
      density: z.number().nullish(),
      majority_sign_method: z.enum(majoritySigns).nullish(),
    })
    .nullish(),
};

const parameters = z.looseObject({
  ...adapterParameters,
  do_sample: z.boolean().nullish(),
  max_new_tokens: z.int().min(1).nullish(),
  ignore_eos_token: z.boolean().nullish(),
  repetition_penalty: z.number().gt(0).nullish(),
  return_full_text: z.boolean().nullish(),
  stop: z.array(z.string()).nullish(),
  seed: z.int().min(0).nullish(),
  temperature: z.number().min(0).nullish(),
  top_k: z.int().min(1).nullish(),
  top_p: z.number().gt(0).lte(1).nullish(),
  best_of: z.int().min(1).nullish(),
  details: z.boolean().nullish(),
  response_format: z.object({ type: z.literal('json_object'), schema: z.unknown().optional() }).nullish(),
});
const loraxBody = z.object({
  inputs: z.string().min(1),
  parameters: parameters.nullish(),
  stream: z.boolean().nullish(),
});

/**
 * @param value        the parsed body
 * @param baseModels   names that stand for no adapter; with several one must be named
 * @param wantsStream  null: as the body says, and a whole answer is in a list, which is what `/` does
 * @param newSeed      of a request that samples and names none: clients are told it
 * @throws GatewayError invalid_value, missing_required_parameter
 */
export function parseLorax(
  value: Record<string, unknown>,
  baseModels: readonly string[],
  wantsStream: boolean | null,
  newSeed: () => number,
): LoraxRequest {
  const parsed = parseShape(loraxBody, value);
  const { inputs, stream } = parsed;
  const given = parsed.parameters ?? {};
  refuseGiven(given);
  const isStream = wantsStream ?? stream ?? false;
  const bestOf = given.best_of ?? 1;
  if (isStream && bestOf > 1) throw invalid('best_of', `expected 1 for a stream, got ${bestOf}`);
  const isSampling =
    given.temperature !== 0 &&
    (given.do_sample === true || [given.temperature, given.top_k, given.top_p].some((set) => set != null));
  if (bestOf > 1 && !isSampling) throw invalid('best_of', `expected 1 without sampling, got ${bestOf}`);
  const seed = isSampling ? (given.seed ?? newSeed()) : null;
  const who = whoIsAsked(given, baseModels);
  const format = given.response_format;
  const body = {
    model: who.model,
    prompt: inputs,
    stream: isStream,
    ...(isStream && { stream_options: { include_usage: true } }),
    max_tokens: given.max_new_tokens ?? defaultNewTokens,
    temperature: isSampling ? (given.temperature ?? 1) : 0,
    ...(isSampling && { seed, top_k: given.top_k, top_p: given.top_p }),
    repetition_penalty: given.repetition_penalty,
    stop: given.stop,
    ignore_eos: given.ignore_eos_token,
    best_of: bestOf,
    n: 1,
    // Of the token that was drawn alone; vLLM tells its id when it is asked for ids, our engine beside the logprobs.
    logprobs: 0,
    return_token_ids: true,
    ...(format && {
      response_format:
        format.schema == null
          ? { type: 'json_object' }
          : { type: 'json_schema', json_schema: { name: 'response', schema: format.schema } },
    }),
  };
  const shape: Shape = {
    prefix: given.return_full_text ? inputs : '',
    hasDetails: given.details ?? false,
    seed,
    isList: wantsStream === null,
  };
  return {
    path: enginePaths.completions,
    asked: {
      ...who,
      user: null,
      isStream,
      maxTokens: body.max_tokens,
      numChoices: bestOf,
    },
    body: Buffer.from(JSON.stringify(body)),
    translation: new LoraxTranslation(shape),
  };
}

/** @throws GatewayError invalid_value, of the first field that is wrong */
export function parseShape<T>(shape: z.ZodType<T>, value: unknown): T {
  const parsed = shape.safeParse(value);
  if (parsed.success) return parsed.data;
  const { path, message } = parsed.error.issues[0]!;
  throw invalid(path.join('.'), message);
}

/** @throws GatewayError invalid_value, for what would change the output and cannot be honoured */
export function refuseGiven(parameters: Record<string, unknown>): void {
  for (const [field, expected] of Object.entries(refused)) {
    const value = parameters[field];
    if (value !== undefined && value !== null && value !== false) throw invalid(field, expected);
  }
}

type AdapterParameters = z.infer<z.ZodObject<typeof adapterParameters>>;

/** The adapter, or several, or without any the base model that there is. */
export function whoIsAsked(
  given: AdapterParameters,
  baseModels: readonly string[],
): Pick<Asked, 'model' | 'adapters' | 'merge'> {
  const { adapter_id, merged_adapters: merged } = given;
  if (!merged) return { model: adapter_id || onlyBase(baseModels) };
  if (adapter_id) throw invalid('merged_adapters', 'expected none beside adapter_id');
  const adapters = mergedAdapters(merged);
  const merge = mergeOf(merged);
  return {
    model: adapters.map(({ name }) => name).join('+'),
    adapters,
    ...(merge !== null && { merge }),
  };
}

type MergedAdapters = NonNullable<AdapterParameters['merged_adapters']>;

/** Null for `linear`. */
function mergeOf({
  merge_strategy: method,
  density,
  majority_sign_method: majoritySign,
}: MergedAdapters): MergeRule | null {
  if (!method || method === 'linear') return null;
  if (!(typeof density === 'number' && density > 0 && density <= 1)) {
    const expected = `expected a number above 0 and at most 1 for ${method}, got ${density ?? 'none'}`;
    throw invalid('merged_adapters.density', expected);
  }
  return { method, density, majoritySign: majoritySign ?? 'total' };
}

/**
 * With weights of 1 where none are given. LoRAX's linear sums the As and the Bs apart, which is no sum of deltas, and
 * refuses adapters of different ranks; the sum itself needs neither.
 */
function mergedAdapters({ ids, weights }: MergedAdapters) {
  if (weights?.length && weights.length !== ids.length)
    throw invalid(
      'merged_adapters.weights',
      `expected one for each of ${ids.length} ids, got ${weights.length}`,
    );
  return acceptAdapters(
    readAdapters(ids.map((name, i) => ({ name, weight: weights?.length ? weights[i] : 1 }))),
  );
}

function onlyBase(baseModels: readonly string[]): string {
  if (baseModels.length === 1) return baseModels[0]!;
  const names = baseModels.slice(0, 16).join(', ');
  throw new GatewayError(
    'missing_required_parameter',
    baseModels.length === 0
      ? 'adapter_id: expected the name of a model, got none, and there is no base model'
      : `adapter_id: expected one of the base models ${names} or an adapter, got none`,
    { param: 'adapter_id' },
  );
}

function invalid(param: string, expected: string): GatewayError {
  return new GatewayError('invalid_value', `${param}: ${expected}`, { param });
}

/** What an answer must have, of the request. */
type Shape = { prefix: string; hasDetails: boolean; seed: number | null; isList: boolean };

/** What is read of an engine's completion, whole or of one event. */
type Completion = {
  choices?: {
    text: string;
    token_ids?: number[] | null;
    logprobs?: { tokens: string[]; token_logprobs: (number | null)[]; token_ids?: number[] } | null;
    finish_reason: string | null;
    stop_reason?: string | number | null;
  }[];
  usage?: { prompt_tokens: number; completion_tokens: number } | null;
  error?: { message?: string; code?: string | null };
};
type Choice = NonNullable<Completion['choices']>[number];

type Token = { id: number; text: string; logprob: number; special: boolean };

/** Of one answer: a stream is followed from its first event to its last. */
class LoraxTranslation implements Translation {
  readonly #shape: Shape;
  #text = '';
  #numTokens = 0;
  /** The event that ends the stream waits here for the usage, which comes after it. */
  #last: { token: Token; finishReason: string } | null = null;
  #isOver = false;

  constructor(shape: Shape) {
    this.#shape = shape;
  }

  whole(status: number, body: Buffer): { status: number; body: Buffer } {
    const answer = parse(body.toString());
    const choice = answer?.choices?.[0];
    if (status !== 200 || choice === undefined) return errorAnswer(...engineError(status, answer));
    const { prefix, hasDetails, seed, isList } = this.#shape;
    const tokens = tokensOf(choice);
    const details = hasDetails && {
      finish_reason: finishReasonOf(choice),
      prompt_tokens: answer!.usage?.prompt_tokens ?? 0,
      generated_tokens: answer!.usage?.completion_tokens ?? tokens.length,
      seed,
      prefill: [],
      tokens,
    };
    const generated = { generated_text: prefix + choice.text, ...(details && { details }) };
    return { status, body: Buffer.from(JSON.stringify(isList ? [generated] : generated)) };
  }

  /** @param bytes  whole events of the engine */
  events(bytes: Buffer): Buffer {
    let out = '';
    for (const line of bytes.toString().split('\n')) {
      if (line.startsWith('data:')) out += this.#event(line.slice('data:'.length).trim());
    }
    return Buffer.from(out);
  }

  error(failure: GatewayError): string {
    const { body } = loraxError(failure);
    return this.#isOver ? '' : eventOf(body);
  }

  #event(data: string): string {
    if (this.#isOver) return '';
    if (data === '[DONE]') return this.#end(0);
    const event = parse(data);
    if (event?.error) {
      this.#isOver = true;
      return eventOf(JSON.parse(errorAnswer(...engineError(500, event)).body.toString()));
    }
    const choice = event?.choices?.[0];
    if (choice === undefined) return event?.usage ? this.#end(event.usage.prompt_tokens) : '';
    this.#text += choice.text;
    const isLast = choice.finish_reason !== null;
    const tokens = tokensOf(choice);
    // An end by a limit that is seen late says no token.
    if (tokens.length === 0 && !isLast) return '';
    const token = joined(tokens, choice, isLast && finishReasonOf(choice) === 'eos_token');
    this.#numTokens += tokens.length;
    if (isLast) {
      this.#last = { token, finishReason: finishReasonOf(choice) };
      return '';
    }
    return eventOf({ token, generated_text: null, details: null });
  }

  #end(promptTokens: number): string {
    if (this.#last === null) return '';
    this.#isOver = true;
    const { prefix, hasDetails, seed } = this.#shape;
    const { token, finishReason } = this.#last;
    const details = {
      finish_reason: finishReason,
      prompt_tokens: promptTokens,
      generated_tokens: this.#numTokens,
      seed,
    };
    return eventOf({ token, generated_text: prefix + this.#text, details: hasDetails ? details : null });
  }
}

/** One token an event. Its text is what it adds to the output, so that the texts make up the whole; the end token has its name. */
function joined(tokens: readonly Token[], { text }: Choice, isEnd: boolean): Token {
  const last = tokens.at(-1) ?? { id: 0, text: '', logprob: 0, special: true };
  const special = isEnd || tokens.length === 0;
  return { ...last, text: special && text === '' ? last.text : text, special };
}

function tokensOf(choice: Choice): Token[] {
  const { logprobs } = choice;
  const ids = choice.token_ids ?? logprobs?.token_ids ?? [];
  const numTokens = logprobs?.tokens.length ?? 0;
  return Array.from({ length: numTokens }, (_, i) => ({
    id: ids[i] ?? 0,
    text: logprobs!.tokens[i]!,
    logprob: logprobs!.token_logprobs[i] ?? 0,
    special: i === numTokens - 1 && choice.finish_reason !== null && finishReasonOf(choice) === 'eos_token',
  }));
}

function finishReasonOf({ finish_reason, stop_reason }: Choice): 'length' | 'eos_token' | 'stop_sequence' {
  if (finish_reason !== 'stop') return 'length';
  return stop_reason === null || stop_reason === undefined ? 'eos_token' : 'stop_sequence';
}

function parse(text: string): Completion | null {
  try {
    return JSON.parse(text) as Completion;
  } catch {
    // Not an engine's answer: what is missing is told as that.
    return null;
  }
}

const eventOf = (data: object) => `data:${JSON.stringify(data)}\n\n`;

export function engineError(status: number, answer: Pick<Completion, 'error'> | null): [number, string] {
  // What calls itself an answer and is none is the engine's failure.
  const failed = status === 200 ? 502 : status;
  return [failed, answer?.error?.message ?? 'the engine answered something else than was asked'];
}

export function errorAnswer(status: number, message: string): { status: number; body: Buffer } {
  const { status: told, errorType } = toldAs(status);
  return { status: told, body: Buffer.from(JSON.stringify({ error: message, error_type: errorType })) };
}

/** An error of the gateway in this protocol. */
export function loraxError(failure: GatewayError): { status: number; body: object } {
  const { status, errorType } = toldAs(failure.row.status, failure.code);
  return { status, body: { error: failure.message, error_type: errorType } };
}

/** LoRAX has words for four kinds of failure; of others the status says it, and the type is our own code. */
function toldAs(status: number, code?: ErrorCode): { status: number; errorType: string } {
  if (status === 429 || status === 503) return { status, errorType: 'overloaded' };
  if (status === 500 || status === 502 || status === 504) return { status: 424, errorType: 'generation' };
  if (status === 404) return { status, errorType: code ?? 'model_not_found' };
  if (status === 401 || status === 405 || status === 499) return { status, errorType: code ?? 'validation' };
  return { status: 422, errorType: 'validation' };
}
