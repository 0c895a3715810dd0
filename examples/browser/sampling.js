// Which token follows, by its logits.

/** The id of the largest logit; of equal ones the lower. */
export function greedy(logits) {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  return best;
}

/** A token drawn from the softmax of logits / temperature, among the `topK` largest; temperature 0 is greedy. */
export function sample(logits, temperature, topK = 20, random = Math.random) {
  if (temperature === 0) return greedy(logits);
  const ids = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b).slice(0, topK);
  const weights = ids.map((id) => Math.exp((logits[id] - logits[ids[0]]) / temperature));
  let rest = random() * weights.reduce((sum, weight) => sum + weight, 0);
  for (let at = 0; at < ids.length; at++) {
    rest -= weights[at];
    if (rest < 0) return ids[at];
  }
  return ids[0];
}
