# shellcheck shell=bash disable=SC2016,SC2154 # a default may refer to settings above it: '$name'
# Every setting of run.sh, one line each:
#
#   setting NAME DEFAULT STAGES KIND MEANING
#
#   DEFAULT  value if the environment, the recipe and the profile set none
#   STAGES   stages whose results depend on it: 0 data, 2 training, 3 merged model, 4 speech of the evaluation,
#            4s its scores; -1 what is downloaded; "-" none: it may change at any time
#   KIND     allowed values: int or number with bounds (int>=1, number>0<=1), choices (zh|en), ints (several, separated
#            by spaces), devices (cpu, cuda:0 ...), name, text, path, folder (for results), input (a file or folder
#            that is read: results depend on its content, too), inputs (several, separated by spaces; "\ " is a space in
#            a path), rewards (see tts_grpo/reward/rewards.py). With "?", it may be empty
#
# The defaults are the training settings of the newest published recipe (conf/recipes/mair-hub.sh).
#
# Set them in the environment, or in conf/recipes/$recipe.sh, conf/evaluations/$evaluation.sh,
# conf/algorithms/$algorithm.sh and conf/$profile.sh, as
# name=${name:-value}; where several set a value, the first in this order counts. A profile holds only values that differ
# from the defaults. "bash run.sh --settings" prints all values and where they come from.

# experiment
setting profile tiny - name 'conf/$profile.sh: tiny (CPU, offline), cosyvoice2 or cosyvoice3 (GPUs)'
setting recipe '' - text? 'conf/recipes/$recipe.sh: a published recipe, for profile=cosyvoice2'
setting evaluation '' - text? 'conf/evaluations/$evaluation.sh: sampling and texts of published figures: official, seed or mair-hub'
setting exp_name '${recipe:-$profile}' - name "name of the experiment"
setting exp_dir '$root/exp/$exp_name' - folder "folder of the experiment"
setting seed 42 2 int "random seed of data order and sampling in training"
setting force 0 - "0|1" "1: redo the requested stages from scratch"
setting base_python python3 - path "interpreter that the environments are built on, 3.11 or 3.12"
setting venv_root '$root/.venv' - path "folder of the environments speech and trainer"
setting make_envs 1 - "0|1" "0: use the environments in venv_root as they are"
setting trainer_requirements '$root/requirements-verl.txt' - path "pinned packages of the trainer environment"

# models
setting sft_path '' 0 input "language model to train, a Hugging Face folder"
setting token2wav_dir '' "2 4" input "token2wav model: speech tokens to waveform"
setting reward_asr_dir '' 2 input "speech recogniser of the reward"
setting eval_asr_dir '' 4s input "speech recogniser of the evaluation; must differ from the reward's"

# data (stage 0)
setting train_jsonl '' 0 input "training texts, JSONL"
setting test_jsonl '' 0 input "validation texts, JSONL"
setting known_answer_jsonl '' - path "JSONL of real speech (text, speech_tokens) for the known-answer check of the reward"
setting max_prompt_length 512 0 "int>=1" "longest prompt, in tokens"
setting speech_prefix none 0 "none|recording|voice" "what a rollout continues: nothing, 1 to 5 s of the text's own recording (speech_tokens in the files), or a voice of prompt_list"
setting max_bad_ratio 0.01 0 "number>=0<=1" "largest tolerated share of unusable lines in the data"
setting max_test_overlap 0.1 0 "number>=0<=1" "largest tolerated share of test texts that are trained on"
setting text_tags reject "0 4 4s" "reject|remove" "texts with tags such as [laughter] or <|im_end|>: leave them out, or remove the tags"
setting llm_text raw "0 4" "raw|spoken" "what the language model reads: raw texts, or spoken: numbers and signs in words"

# reward server (stage 1)
setting server_address 127.0.0.1 - name "address that the reward server listens on; 0.0.0.0 serves other machines"
setting server_secret_file '' - path? "file with a secret of at least 16 characters; needed to serve other machines"
setting http_port 8000 - "int>=1<=65535" "HTTP port of the reward server"
setting grpc_port 8001 - "int>=1<=65535" "gRPC port of the reward server"
setting metrics_port 8002 - "int>=1<=65535" "port for metrics of the reward server"
setting server_urls 'http://127.0.0.1:$http_port' - text "servers that training uses, separated by commas"
setting reward_patience_s 180 - "number>=0" "seconds for which failed reward requests are retried before the training stops"
setting server_timeout_s 900 - "int>=1" "longest wait for the server, in seconds"
setting batch_timeout_s 240 - "number>0" "seconds after which a server process that has not answered a batch is restarted; more for full-size models on a CPU"
setting server_devices cpu - devices "torch devices, separated by spaces"
setting server_instances 2 - "int>=1" "processes per device"
setting server_threads 4 - "int>=1" "torch threads per process"
setting server_batch_size 64 - "int>=1" "largest batch of rollouts"
setting token2wav_precision fp16 2 "fp32|fp16|bf16" "precision of the server's token2wav"
setting max_unscored_share 0.001 - "number>=0<=1" "largest share of rollouts that servers may fail to score, counted as bad; 0: none"
setting check_reward_freq 50 - "int>=0" "steps between known-answer checks of the reward servers in training, which precede each checkpoint, too; 0: none"
setting check_reward 1 - "0|1" "0: train even if the known-answer check of the reward fails"
setting rewards intelligibility:1 2 rewards "parts of the reward with weights and options, see docs/rewards.md"
setting reward_asr_dirs '' 2 inputs? "several recognisers of the reward, separated by spaces, instead of reward_asr_dir"
setting reward_asr_pool mean 2 "mean|worst" "error rate of several recognisers: their mean, or the worst"
setting reward_curve exp 2 "exp|tanh" "maps the error rate to the reward, see tts_grpo/reward/curves.py"
setting reward_tones 0 2 "0|1" "1: tones count in the reward's pinyin error rate"
setting prompt_audio '' 2 input? "recording of the voice of stages 1 and 5"
setting prompt_text '' 2 text? "transcript of prompt_audio"
setting prompt_list '' 2 input? "JSONL of voices for stage 1, instead of prompt_audio and prompt_text"
setting prompt_voice_per text 2 "text|rollout" "draw a voice of prompt_list per text or per rollout"

# GRPO (stage 2)
setting num_gpus 1 2 "int>=1" "GPUs per machine for training; with tiny, workers on the CPU"
setting num_nodes 1 2 "int>=1" "machines; several need ray_address"
setting ray_address '' - text? "running Ray cluster (ray start), such as 10.0.0.1:6379"
setting train_device cuda 2 "cpu|cuda" "device of the training"
setting total_steps 1800 2 "int>=1" "training steps; a larger number extends a finished training"
setting train_batch_size 32 "0 2" "int>=1" "prompts per step"
setting mini_batch_size '$train_batch_size' 2 "int>=1" "prompts per update"
setting micro_batch_size 8 - "int>=1" "rollouts per forward and backward pass of a GPU, if pack_tokens is 0"
setting pack_tokens 0 - "int>=0" "tokens per forward and backward pass of a GPU, as many rollouts as that holds"
setting recompute 1 - "0|1" "1: activations are computed again in the backward pass, which saves memory"
setting rollout_n 8 2 "int>=1" "rollouts per prompt"
setting rollout_temperature 1.0 2 "number>0" "sampling temperature of rollouts and validation"
setting rollout_top_p 1.0 2 "number>0<=1" "top-p of rollouts and validation; 1.0: off"
setting rollout_top_k -1 2 "int>=-1" "top-k of rollouts and validation; -1: off"
setting max_response_length 1024 2 "int>=1<=2048" "longest rollout, in tokens; the reward server takes up to 2048"
setting learning_rate 1e-6 2 "number>0" "learning rate of AdamW"
setting learning_rate_schedule constant 2 "constant|cosine" "cosine decays to 0 at total_steps"
setting adam_eps 1e-8 2 "number>0" "epsilon of AdamW; a large value keeps weights with almost no gradient unchanged"
setting credit utterance 2 "syllable|utterance" "advantages per utterance (adv_estimator) or per syllable (tts_grpo/training/credit.py)"
setting recipe_args '' 2 text? "veRL overrides of the recipe, its recipe_verl_args"
setting overrides '' 2 text? "veRL overrides of the command line, those after --"
setting vllm_memory_share 0.4 - "number>0<=1" "share of a GPU's memory for vLLM's weights and cache"
setting test_freq 50 - "int>=1" "steps between validations"
setting save_freq 50 - "int>=1" "steps between checkpoints"
setting max_checkpoints 4 - "int>=1" "checkpoints that are kept; at least the last two while training"
setting train_threads 4 - "int>=1" "torch threads of the training"
setting llm_path '' 3 path? "checkpoint that stage 3 merges, .../global_step_N; empty: the last one"

# algorithm (stage 2): conf/algorithms/$algorithm.sh has the values that differ from these
setting algorithm grpo 2 name "grpo, dr_grpo, dapo, gspo or gdpo, as published; a single value below takes precedence"
setting adv_estimator grpo 2 name "advantage estimator of veRL, for credit=utterance"
setting norm_adv_by_std False 2 "True|False" "True: divide advantages by the standard deviation of the group's rewards"
setting loss_mode vanilla 2 "vanilla|gspo|sapo|geo_mean|cispo|clip_cov|kl_cov|gpg" "policy loss of veRL; vanilla: PPO's, clipped per token"
setting loss_agg_mode token-mean 2 "token-mean|token-sum|seq-mean-token-mean|seq-mean-token-sum|seq-mean-token-sum-norm" "how the loss is averaged over tokens and rollouts; -norm: divided by max_response_length"
setting clip_ratio_low 0.2 2 "number>=0" "the ratio of probabilities is clipped at 1 - this"
setting clip_ratio_high 0.2 2 "number>=0" "the ratio of probabilities is clipped at 1 + this"
setting clip_ratio_c 3.0 2 "number>1" "largest ratio for negative advantages (dual clip)"
setting filter_groups False 2 "True|False" "True: replace groups whose rewards are all equal (dynamic sampling)"
setting overlong_percent 0 2 "int>=0<=100" "last part of max_response_length, in percent, in which the reward falls by up to 1; 0: none"
setting kl_loss_coef 0 2 "number>=0" "weight of the KL divergence from the SFT model in the loss; 0: none"
setting kl_loss_type low_var_kl 2 "kl|abs|mse|low_var_kl" "estimator of this divergence: k1, absolute value of k1, k2 or k3"

# LoRA (stage 2)
setting lora_rank 0 2 "int>=0" "rank of LoRA adapters; 0: all weights are trained"
setting lora_alpha 16 2 "int>=1" "scale of LoRA adapters: alpha / rank"
setting lora_modules all-linear 2 text "modules with LoRA adapters, separated by spaces, such as q_proj v_proj"

# evaluation (stages 4 and 5)
setting eval_jsonl '' 4s input "test set, JSONL; infer_dist.py synthesises what has changed in it"
setting eval_jsonls '' 4s inputs? "several test sets, separated by spaces, instead of eval_jsonl; a set has the name of its file"
setting eval_asr_dir_en '' 4s input? "speech recogniser of test_en and of other sets in English; empty: eval_asr_dir"
setting language zh "0 2 4 4s" "zh|en" "language of lines that have no key language of their own; zh: Chinese, which may contain English words"
setting seeds "0 1 2 3 4" 4s ints "random seeds; the set is synthesised once with each"
setting judge_asr_dir '' 4s input? "a further recogniser that nothing was trained or chosen by, for a second opinion"
setting quality_utterances 100 4s "int>=0" "utterances for speaker similarity, DNSMOS and F0; 0: none"
setting reference_audio '' 4s input? "recordings of the voice, for sets without prompts"
setting speaker_model_dir '' 4s input? "WavLM folder for speaker similarity; empty: Resemblyzer"
setting infer_procs '$num_gpus' - "int>=1" "torchrun processes, one per GPU"
setting infer_device cuda - "cpu|cuda" "device of the evaluation"
setting infer_engine auto 4 "auto|continuous|batches" "generation in the evaluation: continuous batching, or whole batches; auto: continuous on a GPU"
setting infer_batch_size 128 4 "int>=1" "utterances per batch"
setting infer_precision fp32 4 "fp32|fp16|bf16" "precision of token2wav in the evaluation"
setting infer_lm_precision bf16 4 "fp32|bf16" "precision of the language model"
setting temperature 0.8 4 "number>=0" "sampling temperature of the evaluation; 0: greedy decoding"
setting top_p 0.95 4 "number>0<=1" "top-p of the evaluation; 1.0: off"
setting top_k 50 4 "int>=-1" "top-k of the evaluation; -1: off"
setting repetition_penalty 1.0 4 "number>0" "penalty on token ids of prompt and response; 1.0: off"
setting repetition_window 0 4 "int>=0" "a token among this many last ones is replaced by one drawn from all others, as CosyVoice does with 10; 0: off"
setting min_token_text_ratio 0 4 "number>=0" "minimum number of speech tokens per text token in the evaluation; 0: none"
setting max_token_text_ratio 0 4 "number>=0" "maximum number of speech tokens per text token, instead of max_new_tokens; 0: max_new_tokens"
setting max_new_tokens 2048 4 "int>=1" "maximum number of tokens per utterance in the evaluation"
setting single_text '' - text? "text of stage 5; empty: the tongue-twister"

# downloads of the full-size profile, and settings from which it derives others
if [[ $profile != tiny ]]; then
  setting workspace /workspace - path "folder of downloads"
  setting llm llasa -1 "llasa|official" "language model to train: yuekai's SFT model of CosyVoice2's tokens, or CosyVoice's own"
  setting llm_pt llm.pt -1 path "with llm=official: weights to start from, a file of token2wav_dir such as CosyVoice3's llm.rl.pt, or the path of a checkpoint of CosyVoice's trainer"
  setting model_hub modelscope -1 "modelscope|huggingface" "hub from which CosyVoice's model is downloaded"
  setting sft_checkpoint checkpoint-885000 -1 text? "folder of llasa's repository to train; empty: its root"
  setting cosyvoice_dir '$workspace/CosyVoice' "-1 2 4" input "source of CosyVoice"
  setting cosyvoice_url https://github.com/FunAudioLLM/CosyVoice.git -1 text "repository of that source"
  setting cosyvoice_commit ace7c47f41bbd303aa6bf1ea80e6f9fbd595cd40 -1 text "commit of that source"
  setting train_texts 'emilia_$language' -1 name "metadata of SparkAudio/voxbox: emilia_zh, emilia_en, or aishell-3 (88,035 texts)"
  setting num_train 80000 -1 "int>=1" "number of texts to consider for training: the first in the language and shorter than max_text_s"
  setting num_test 100 -1 "int>=1" "number of validation texts: the last ones, unfiltered"
  setting max_text_s 30 -1 "number>=0" "limit on the duration of a text's recording, in seconds; 0: none"
  setting text_excludes '[A-Za-z]' -1 text? "regular expression; matching texts are left out, as in mair-hub; empty with language=en"
  setting reward_voices 1 -1 "int>=1" "1: prompt_audio; N: that many recordings of AISHELL's test set as prompt_list"
  setting dataset 'zero_shot_$language' -1 names "test sets, separated by spaces: test_zh, test_en, test_hard, zero_shot_zh, zero_shot_en, zero_shot_hard_zh, zero_shot_hard_en"
  setting eval_strip_quotes 0 -1 "0|1" "1: remove quotes and brackets from the sets' texts"
  setting gpu_memory_gib 80 - "int>=1" "memory of the smallest GPU, in GiB"
  setting server_gib 9 - "int>=1" "memory that a reward server process may take of a GPU, in GiB"
fi
