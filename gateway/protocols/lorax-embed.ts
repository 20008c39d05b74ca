// LoRAX's /embed in terms of OpenAI's embeddings: {inputs, parameters} → {embeddings}, one vector of one text. Pure.
//
// /classify and /classify_batch are refused: they label tokens, which takes a head that no causal base model has.
// Source: predibase/lorax, router/src/lib.rs (EmbedRequest, EmbedResponse).

import { z } from 'zod';
import { enginePaths } from '../../engine/protocol.ts';
import { GatewayError } from '../errors.ts';
import type { Translation } from '../forward.ts';
import {
  adapterParameters,
  engineError,
  errorAnswer,
  type LoraxRequest,
  parseShape,
  refuseGiven,
  whoIsAsked,
} from './lorax.ts';

const embedBody = z.object({
  inputs: z.string().min(1),
  parameters: z.looseObject(adapterParameters).nullish(),
});

/**
 * @param value       the parsed body
 * @param baseModels  names that stand for no adapter; with several one must be named
 * @throws GatewayError invalid_value, missing_required_parameter
 */
export function parseEmbed(value: Record<string, unknown>, baseModels: readonly string[]): LoraxRequest {
  const { inputs, parameters } = parseShape(embedBody, value);
  const given = parameters ?? {};
  refuseGiven(given);
  const who = whoIsAsked(given, baseModels);
  return {
    path: enginePaths.embeddings,
    asked: { ...who, user: null, isStream: false, maxTokens: null, numChoices: 1 },
    body: Buffer.from(JSON.stringify({ model: who.model, input: inputs, encoding_format: 'float' })),
    translation: embedTranslation,
  };
}

const embedTranslation: Translation = {
  whole(status, body) {
    const answer = parse(body);
    const vector = answer?.data?.[0]?.embedding;
    if (status !== 200 || vector === undefined) return errorAnswer(...engineError(status, answer));
    return { status, body: Buffer.from(JSON.stringify({ embeddings: vector })) };
  },
  // Vectors are not streamed.
  events: (bytes) => bytes,
  error: () => '',
};

type Answer = { data?: { embedding?: number[] }[]; error?: { message?: string } };

function parse(body: Buffer): Answer | null {
  try {
    return JSON.parse(body.toString()) as Answer;
  } catch {
    return null;
  }
}

/** What is answered to a request for labels of tokens. */
export function noClassifier(path: string): GatewayError {
  return new GatewayError(
    'invalid_value',
    `${path}: expected a base model with a head that classifies tokens, got causal language models, which have none`,
  );
}
