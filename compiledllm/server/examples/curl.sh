#!/usr/bin/env bash
# A running server, asked with curl: ./curl.sh [http://127.0.0.1:8000]
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
json=(-H 'content-type: application/json')
# With keys: json+=(-H "authorization: Bearer $COMPILEDLLM_API_KEY")

curl -sS "$url/v1/models"; echo
curl -sS "${json[@]}" "$url/v1/chat/completions" -d '{
  "messages": [{"role": "user", "content": "Name three colours."}],
  "temperature": 0, "max_completion_tokens": 32
}'; echo
curl -sSN "${json[@]}" "$url/v1/completions" -d '{
  "prompt": "The capital of France is", "max_tokens": 8, "stream": true,
  "stream_options": {"include_usage": true}
}'
