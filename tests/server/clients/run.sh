#!/bin/bash
# Clients from outside against a running server, each in an environment of its own: more than a test may install.
#   run.sh http://127.0.0.1:8000 MODEL TOKENIZER_FOLDER [frameworks llamaindex litellm qwenagent node evaluation codex qwen opencode]
# Environments are kept in $CLIENTS_HOME, by default build/clients. The exit status is the number of clients that failed.
set -u
url=${1%/}; url=${url%/v1}; model=$2; tokenizer=$(realpath "$3"); shift 3
here=$(cd "$(dirname "$0")" && pwd); home=${CLIENTS_HOME:-$here/../../../build/clients}; mkdir -p "$home"; home=$(realpath "$home")
names=("$@"); [ $# = 0 ] && names=(frameworks llamaindex litellm qwenagent node evaluation codex qwen opencode)
failed=0

environment() { # name, packages...
  local folder=$home/$1; shift
  [ -e "$folder/.done" ] && return
  python3 -m venv "$folder" && "$folder/bin/pip" install -q "$@" && touch "$folder/.done"
}
packages() { # npm packages, in one folder
  mkdir -p "$home/node"
  for package in "$@"; do [ -d "$home/node/node_modules/$package" ] || (cd "$home/node" && npm install --no-audit --no-fund --silent "$package"); done
}
frameworks() { # environment, the clients in it...
  local python=$home/$1/bin/python; shift
  "$python" "$here/frameworks.py" "$url" "$model" "$@"
}

for name in "${names[@]}"; do
  case $name in
    frameworks) environment frameworks langchain-openai openai-agents "pydantic-ai-slim[openai]" instructor &&
      frameworks frameworks langchain agents pydantic_ai instructor ;;
    llamaindex) environment llamaindex llama-index-llms-openai-like && frameworks llamaindex llama_index ;;
    litellm) environment litellm litellm && frameworks litellm litellm ;;
    qwenagent) environment qwenagent qwen-agent soundfile tqdm python-dateutil && frameworks qwenagent qwen_agent ;;
    evaluation) environment lmeval "lm-eval[api]" transformers && "$here/evaluation.sh" "$home/lmeval/bin/lm_eval" "$url" "$model" "$tokenizer" ;;
    node) packages openai && cp "$here/node_client.mjs" "$home/node/" && node "$home/node/node_client.mjs" "$url" "$model" ;;
    codex) packages @openai/codex && PATH=$home/node/node_modules/.bin:$PATH "$here/agents.sh" codex "$url" "$model" ;;
    qwen) packages @qwen-code/qwen-code && PATH=$home/node/node_modules/.bin:$PATH "$here/agents.sh" qwen "$url" "$model" ;;
    opencode) packages opencode-ai && PATH=$home/node/node_modules/.bin:$PATH "$here/agents.sh" opencode "$url" "$model" ;;
    *) echo "no client $name"; false ;;
  esac
  rc=$?
  [ $rc = 0 ] && echo "ok    $name" || { echo "FAIL  $name ($rc)"; failed=$((failed + 1)); }
done
exit $failed
