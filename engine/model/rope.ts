/**
 * Rotary embeddings as a table of inverse frequencies, with the scaling that a model's config asks for already in it.
 * Sources: RoPE (Su et al., 2021); YaRN (Peng et al., 2023); Llama 3's rule as in transformers' modeling_rope_utils.
 */
import { InputError, shown } from '../input-error.ts';

export type RopeScaling =
  | { type: 'default' }
  | { type: 'linear'; factor: number }
  | {
      type: 'llama3';
      factor: number;
      lowFreqFactor: number;
      highFreqFactor: number;
      originalMaxPositions: number;
    }
  | {
      type: 'yarn';
      factor: number;
      originalMaxPositions: number;
      /** Multiplies cos and sin; null: 1 + 0.1·ln(factor). */
      attentionFactor: number | null;
      betaFast: number;
      betaSlow: number;
      truncate: boolean;
    }
  /** Each frequency's own divisor: GGUF's rope_freqs.weight. */
  | { type: 'factors'; factors: Float32Array };

export interface RopeTable {
  /** [headDim / 2] */
  inverseFrequencies: Float64Array;
  attentionFactor: number;
}

/** inverseFrequencies[i] = theta^(−2i / headDim), scaled. */
export function ropeTable(headDim: number, theta: number, scaling: RopeScaling): RopeTable {
  const plain = Float64Array.from({ length: headDim / 2 }, (_, i) => theta ** ((-2 * i) / headDim));
  switch (scaling.type) {
    case 'default':
      return { inverseFrequencies: plain, attentionFactor: 1 };
    case 'linear':
      return { inverseFrequencies: plain.map((f) => f / scaling.factor), attentionFactor: 1 };
    case 'factors':
      return { inverseFrequencies: plain.map((f, i) => f / scaling.factors[i]!), attentionFactor: 1 };
    case 'llama3': {
      // Long waves are stretched by `factor`, short ones kept, those between blended.
      const { factor, lowFreqFactor: low, highFreqFactor: high, originalMaxPositions } = scaling;
      const stretch = (f: number) => {
        const turns = (originalMaxPositions * f) / (2 * Math.PI);
        const kept = Math.min(1, Math.max(0, (turns - low) / (high - low)));
        return (1 - kept) * (f / factor) + kept * f;
      };
      return { inverseFrequencies: plain.map(stretch), attentionFactor: 1 };
    }
    case 'yarn': {
      // Dimensions that turn more than betaFast times over the original context are kept, those that turn less than
      // betaSlow times are stretched, a ramp lies between.
      const { factor, originalMaxPositions, betaFast, betaSlow, truncate } = scaling;
      const dimensionOf = (turns: number) =>
        (headDim * Math.log(originalMaxPositions / (turns * 2 * Math.PI))) / (2 * Math.log(theta));
      const [lowest, highest] = [dimensionOf(betaFast), dimensionOf(betaSlow)];
      const low = Math.max(truncate ? Math.floor(lowest) : lowest, 0);
      const high = Math.min(truncate ? Math.ceil(highest) : highest, headDim - 1);
      const span = high === low ? 0.001 : high - low;
      const blend = (f: number, i: number) => {
        const stretched = Math.min(1, Math.max(0, (i - low) / span));
        return (f / factor) * stretched + f * (1 - stretched);
      };
      return {
        inverseFrequencies: plain.map(blend),
        attentionFactor: scaling.attentionFactor ?? yarnMscale(factor, 1),
      };
    }
  }
}

const yarnMscale = (factor: number, mscale: number) =>
  factor <= 1 ? 1 : 0.1 * mscale * Math.log(factor) + 1;

/**
 * The scaling that a Hugging Face config describes: `rope_scaling` of transformers 4, one entry of `rope_parameters` of 5.
 * @param field its name, for messages
 */
export function parseRopeScaling(
  value: Record<string, unknown> | null,
  field: string,
  maxPositions: number,
): RopeScaling {
  if (value === null) return { type: 'default' };
  const refuse = (name: string, expected: string): never => {
    throw new InputError(
      'model_invalid',
      `${field}.${name}: expected ${expected}, got ${shown(value[name])}`,
    );
  };
  const number = (name: string, fallback?: number): number => {
    const given = value[name] ?? fallback;
    return typeof given === 'number' && Number.isFinite(given) && given > 0
      ? given
      : refuse(name, 'a number above 0');
  };
  const optional = (name: string) => (value[name] == null ? null : number(name));

  if ((value.partial_rotary_factor ?? 1) !== 1) refuse('partial_rotary_factor', '1');
  const type = value.rope_type ?? value.type ?? 'default';
  switch (type) {
    case 'default':
      return { type: 'default' };
    case 'linear':
      return { type: 'linear', factor: number('factor') };
    case 'llama3': {
      const [lowFreqFactor, highFreqFactor] = [number('low_freq_factor'), number('high_freq_factor')];
      if (highFreqFactor <= lowFreqFactor)
        refuse('high_freq_factor', `more than low_freq_factor, ${lowFreqFactor}`);
      const originalMaxPositions = number('original_max_position_embeddings');
      return {
        type: 'llama3',
        factor: number('factor'),
        lowFreqFactor,
        highFreqFactor,
        originalMaxPositions,
      };
    }
    case 'yarn': {
      const factor = number('factor');
      const [mscale, mscaleAll] = [optional('mscale'), optional('mscale_all_dim')];
      const ratio = mscale && mscaleAll ? yarnMscale(factor, mscale) / yarnMscale(factor, mscaleAll) : null;
      return {
        type: 'yarn',
        factor,
        originalMaxPositions: number('original_max_position_embeddings', maxPositions),
        attentionFactor: optional('attention_factor') ?? ratio,
        betaFast: number('beta_fast', 32),
        betaSlow: number('beta_slow', 1),
        truncate: value.truncate !== false,
      };
    }
    default:
      return refuse(value.rope_type === undefined ? 'type' : 'rope_type', 'default, linear, llama3 or yarn');
  }
}
