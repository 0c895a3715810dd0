#!/bin/bash
# lm-evaluation-harness over three questions that are written here: log probabilities of prompts, and generation.
#   evaluation.sh LM_EVAL URL MODEL TOKENIZER_FOLDER
set -eu
lm_eval=$1 url=$2 model=$3 tokenizer=$4
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > data.jsonl <<'J'
{"question": "Two and two make", "choices": [" four", " seven", " none"], "label": 0}
{"question": "Snow is", "choices": [" black", " white", " loud"], "label": 1}
{"question": "A week has this many days:", "choices": [" six", " two", " seven"], "label": 2}
J
common="dataset_path: json
dataset_kwargs: {data_files: {test: $work/data.jsonl}}
test_split: test
doc_to_text: '{{question}}'"
cat > choice.yaml <<J
task: local_choice
output_type: multiple_choice
doc_to_choice: '{{choices}}'
doc_to_target: label
metric_list: [{metric: acc}]
$common
J
cat > generate.yaml <<J
task: local_generate
output_type: generate_until
doc_to_target: '{{choices[label]}}'
generation_kwargs: {until: ["."], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
$common
J
OPENAI_API_KEY=none HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=$work/hf "$lm_eval" --model local-completions --tasks local_choice,local_generate \
  --model_args "model=$model,base_url=$url/v1/completions,tokenizer_backend=huggingface,tokenizer=$tokenizer,num_concurrent=2,max_retries=1,tokenized_requests=False" \
  --include_path "$work" > log 2>&1 || { tail -5 log; exit 1; }
grep "local_" log | tail -4
[ "$(grep -c '|local_' log)" -ge 2 ]
