#!/bin/bash
# A coding agent against a server, without a question asked: it must send its tools and read the answer to the end. What an untrained model
# answers does not matter, so the test is that the program ends well and the server has answered.
#   agents.sh codex|qwen|opencode URL MODEL
set -u
agent=$1 url=$2 model=$3
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; export HOME=$work/home; mkdir -p "$HOME"; cd "$work" || exit 1
answered() { curl -s "$url/metrics" | awk '/^vllm:request_success_total/ && /stop|length/ {sum += $NF} END {print sum + 0}'; }
before=$(answered)
task='Say hello. Use no tool.'
case $agent in
  codex) command=(codex exec --json --skip-git-repo-check --sandbox read-only -m "$model" -c model_provider=own
    -c "model_providers.own={name=\"own\",base_url=\"$url/v1\",wire_api=\"responses\",env_key=\"OWN_KEY\"}" "$task") ;;
  qwen) command=(qwen --auth-type openai --yolo -p "$task") ;;
  opencode) command=(opencode run --model "own/$model" "$task")
    cat > opencode.json <<J
{"autoupdate": false, "share": "disabled", "model": "own/$model", "small_model": "own/$model",
 "provider": {"own": {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": "$url/v1", "apiKey": "none"},
   "models": {"$model": {"name": "own", "tool_call": true, "limit": {"context": 8192, "output": 256}}}}}}
J
    ;;
  *) echo "no agent $agent"; exit 1 ;;
esac
export OWN_KEY=none OPENAI_API_KEY=none OPENAI_BASE_URL=$url/v1 OPENAI_MODEL=$model OPENCODE_DISABLE_AUTOUPDATE=1 OPENCODE_DISABLE_MODELS_FETCH=1
timeout "${LIMIT:-240}" "${command[@]}" < /dev/null > out 2>&1; rc=$?
after=$(answered)
[ "$after" -gt "$before" ] || { echo "the server answered nothing; the agent ended with $rc: $(tail -c 600 out)"; exit 1; }
echo "$agent: $((after - before)) answers, exit $rc"
