/** The base model's text side, from its own files: tokenizer and chat template behind the one interface that serving uses. */

import { EngineError } from '../errors.ts';
import type { TextModel } from '../generate.ts';
import { toolFormOf } from '../grammar/tool-calls.ts';
import { InputError } from '../input-error.ts';
import type { BaseModel } from './base-model.ts';
import { ChatTemplate } from './chat-template.ts';
import { loadTokenizer } from './tokenizer.ts';

/** @throws InputError tokenizer_invalid, model_invalid naming what is wrong */
export async function openTextModel(model: BaseModel): Promise<TextModel> {
  const tokenizer = await loadTokenizer(model.tokenizer);
  const template = openTemplate(model.chatTemplate, tokenizer);
  return {
    // The model's, which may be padded beyond the tokenizer's: any of these rows can be drawn and looked up.
    vocabSize: model.dims.vocabSize,
    eosTokenIds: new Set(model.eosIds),
    encode: (text, options) => tokenizer.encode(text, options),
    decode: (tokenIds, options) => tokenizer.decode(tokenIds, options),
    tokenBytes: (tokenId) => tokenizer.tokenBytes(tokenId),
    isSpecial: (tokenId) => tokenizer.isSpecial(tokenId),
    toolForm: toolFormOf(model.chatTemplate ?? ''),
    knowsTools: /\btools\b/.test(model.chatTemplate ?? ''),
    createDetokenizer: (options) => tokenizer.createDetokenizer(options),
    renderChat(messages, options) {
      if (template) return template.render(messages, options);
      throw new EngineError('invalid_value', 'messages: the model has no chat template; use completions', {
        param: 'messages',
      });
    },
  };
}

function openTemplate(
  source: string | null,
  tokens: { bosToken: string | null; eosToken: string | null },
): ChatTemplate | null {
  if (source === null) return null;
  try {
    return new ChatTemplate(source, tokens);
  } catch (cause) {
    throw new InputError('model_invalid', `chat template: ${(cause as Error).message}`, { cause });
  }
}
