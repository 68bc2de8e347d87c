"""What `deepnarrow --help` and `deepnarrow VERB --help` say: a summary and the details of each verb."""

HELP = {
    "train": (
        "pretrain on this machine",
        "Takes Hydra overrides.\n\n"
        "  deepnarrow train model=tiny parallel.pp=2\n"
        "  deepnarrow train model=7b parallel.pp=4 data=files data.path='/corpus/*.jsonl.zst' wandb.mode=online\n\n"
        "The whole configuration is checked and the data prepared before any process is started. Then as many\n"
        "ranks as the layout asks for run under DeepSpeed's launcher; none is left behind, and the exit code is\n"
        "theirs. --cfg job prints the composed configuration.\n\n"
        "The same command started again goes on from the newest sound checkpoint, on whatever layout it now has.\n"
        "Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 save and end it with 0; a second one ends it at once.\n\n"
        "A run that fails, or whose ranks do not move, goes on from there by itself (launch.restarts=10,\n"
        "launch.stall_seconds); what has happened is in events.jsonl, and docs/cluster.md has the rest.\n\n"
        "On several machines, deepnarrow launch --hostfile HOSTS OVERRIDES does the same.",
    ),
    "launch": (
        "pretrain on several machines, and keep that going",
        "Takes Hydra overrides, as train does.\n\n"
        "  deepnarrow launch --hostfile hosts model=67b parallel.pp=12 parallel.tp=8 data=files data.path=/corpus\n"
        "  deepnarrow launch --print slurm model=67b parallel.pp=12 parallel.tp=8 data=files data.path=/c > job\n\n"
        "The hostfile is DeepSpeed's, a line `HOST slots=N` for each machine; rank 0 is on the first. Each is reached\n"
        "by ssh without a password, has this package where it is here, and shares the run folder. An agent on each\n"
        "starts its ranks and ends them when this command is gone or the link is cut; the death of any rank, agent or\n"
        "machine ends all on all of them, and the run goes on from its newest sound checkpoint (launch.restarts). A\n"
        "machine that has failed twice is left out where parallel.dp=null can be smaller. Signals, exit codes and the\n"
        "watch over ranks that do not move (launch.stall_seconds) are those of train.\n\n"
        "In a job of Slurm's no hostfile is needed: the nodes are the job's, and srun reaches them. --print writes\n"
        "what starts the run, with the nodes that its layout takes: slurm an sbatch script that saves and is queued\n"
        "again before its time is over, k8s a JobSet with torchrun in its pods, hostfile the hosts.",
    ),
    "prepare": (
        "tokenise a corpus and keep it for every later run",
        "Takes the overrides of the run that it is for.\n\n"
        "  deepnarrow prepare model=7b data=files data.path='/corpus/*.jsonl.zst' data.tokenizer=tokenizer.json\n\n"
        "A run prepares its data itself where nobody has; for a large corpus do it ahead, without holding GPUs.\n"
        "Start the same command on any number of machines that share data.cache_dir, at any time: each takes what is\n"
        "left. Whatever is killed costs the shards that it had under way, and the bytes are the same however many\n"
        "took part. srun does it under Slurm, --ray auto on a Ray cluster; data.workers is the cores each takes.\n\n"
        "  srun --ntasks-per-node=1 deepnarrow prepare model=7b data=files data.path='s3://bucket/corpus/*.parquet'\n"
        "  deepnarrow prepare model=7b data=tokens data.path=/megatron data.tokenizer=tokenizer.json  # read in place",
    ),
    "refine": (
        "deduplicate a corpus, filter it, and say what went",
        "Takes the overrides of the corpus, and refine.… of its own, which launch/refine/settings.py describes.\n\n"
        "  deepnarrow refine data=files data.path='/raw/*.jsonl.zst' refine.out=/refined\n"
        "  deepnarrow refine 'data.sources={web: {path: /web}, code: {path: /code}}' refine.out=/refined \\\n"
        "      refine.unfiltered=[code] refine.executor=slurm refine.slurm='{partition: cpu, time: \"9:00:00\"}'\n\n"
        "DeepSeek LLM's recipe (arXiv 2401.02954, section 2.1) through datatrove's blocks: one copy of each document\n"
        "over all sources (the same text, then MinHash), filters of length, language, repetition and quality, and a\n"
        "data.sources with the shares to paste. refine.json says what each step removed, removed.md shows samples.\n"
        "The same command goes on after an interruption, and does nothing twice.",
    ),
    "tokenizer": (
        "measure a tokenizer on a corpus, beside others, and on any text",
        "Takes a tokenizer.json or a folder with one, and the overrides of a corpus; without the one it is trained as\n"
        "prepare trains it.\n\n"
        "  deepnarrow tokenizer tokenizer.json data=files data.path=/corpus --against gpt2\n"
        "  deepnarrow tokenizer data=files data.path=/corpus data.tokenizer_vocab_size=100015\n\n"
        "Of each source bytes and characters a token and tokens a word, on text that it was not trained on where\n"
        "there is any; its digits, white space and CJK; round trips of all of Unicode. Exit code 1 where a text does\n"
        "not come back as it was, or can spell a special token.",
    ),
    "describe": (
        "print parameters, FLOPs, KV cache and the split into stages",
        "Takes a preset or any Hydra overrides.\n\n"
        "  deepnarrow describe 67b parallel.pp=12\n"
        "  deepnarrow describe 7b model.n_kv_heads=8 --json",
    ),
    "plan": (
        "find the layout of a cluster that trains a model fastest, before it is paid for",
        "Takes a preset or any Hydra overrides; keys that these set are kept, and the others searched.\n\n"
        "  deepnarrow plan 67b --cluster 32x8xh100 --price 2.5\n"
        "  deepnarrow plan model=67b parallel.tp=4 --cluster cluster.yaml --write plans/67b.yaml\n"
        "  deepnarrow plan 67b --cluster 32x8xh100 --explain 'parallel.pp=16 parallel.tp=8 parallel.schedule=zbv'\n\n"
        "Layouts that would be refused or do not fit drop out; the others are ranked by the predicted time of a step:\n"
        "tokens/s, MFU, bubble, exposed messages, memory of the rank that needs most, days and cost of the run, and\n"
        "the overrides of each. Seconds by formula; memory of the best by dry runs of the code itself, without a GPU.",
    ),
    "dry-run": (
        "run ranks of a layout without its GPUs: memory, messages, FLOPs, and whether it fits",
        "Takes a preset or any Hydra overrides; parallel.dp, pp and tp say how many ranks there are.\n\n"
        "  deepnarrow dry-run 67b parallel.pp=16 parallel.tp=8 parallel.dp=8 parallel.schedule=zbv\n"
        "  deepnarrow dry-run 7b parallel.pp=8 --device-gib 40 --ranks 0,7\n\n"
        "The code that trains runs whole steps of a rank, on any machine, with tensors that have a shape and no\n"
        "values and a process group that only records. Of ranks that do the same one is run (--ranks distinct), in\n"
        "about 3 s each. It prints what each holds by kind and at which pass, what it sends, whether what one rank\n"
        "sends is what the other awaits for all ranks, and whether it fits. Exit code 1 where it does not, or where\n"
        "messages do not pair up.",
    ),
    "export": (
        "write a Hugging Face directory of a run's weights",
        "transformers and vLLM load it as Llama. Ends by comparing its logits with the source's.\n\n"
        "  deepnarrow export runs/7b-files-5e0c2f1 7b-hf --dtype bfloat16",
    ),
    "import": (
        "take in a Llama-shaped Hugging Face directory",
        "Writes weights without an optimizer's state, for init_from.\n\n  deepnarrow import deepseek-llm-7b-base 7b",
    ),
    "regroup": (
        "make fewer key/value heads of many: MHA to GQA or MQA",
        "Takes a run, a checkpoint or a Hugging Face directory, and writes its weights in the format of the source.\n\n"
        "  deepnarrow regroup runs/7b-files-5e0c2f1 7b-gqa8 --kv-heads 8\n"
        "  deepnarrow regroup runs/7b-files-5e0c2f1 7b-gqa8 --kv-heads 8 --method svd --calibrate some.txt\n\n"
        "mean, first and random make a head of neighbours. The others group heads that are alike, by their weights\n"
        "or by what they hold of the first 16,384 tokens of --calibrate, and move their queries along: similar takes\n"
        "the mean, aligned the mean after each was turned to the others, and svd the one head that keeps most. They\n"
        "say how much of keys and values is lost.",
    ),
    "gqa-study": (
        "measure what fewer key/value heads cost in quality and buy at inference",
        "Pretrains a multi-head model with each of three seeds, regroups it to fewer and fewer heads, uptrains every\n"
        "one of them, and answers with tables and pictures: what it costs in quality and buys at inference, a smaller\n"
        "model beside, what heads hold, long range, sliding windows, other warm starts, and when it pays.\n\n"
        "  deepnarrow gqa-study                              a model of 1.8 million parameters, on two cores\n"
        "  deepnarrow gqa-study study.sections=[uptraining,decode] study.seeds=[1]          the first questions alone\n"
        "  deepnarrow gqa-study init_from=runs/7b-files-5e0c2f1 parallel.pp=4 study.kv_heads=[8,4,1]\n\n"
        "Takes overrides of the pretraining (with init_from, whose recipe is that of the weights, those of layout,\n"
        "machine, logs and saves), and study.sections, study.seeds, study.kv_heads, study.methods,\n"
        "study.warm_starts, study.alphas, study.alpha, study.windows, study.smaller_layers, study.contexts,\n"
        "study.batches, study.device, study.parallel_runs, study.dir; docs/gqa-study.md says what each section\n"
        "measures and how to read it. The same command goes on where it was stopped; a folder of another recipe or of\n"
        "other shares is refused.",
    ),
    "roofline": (
        "say when fewer key/value heads pay: prefill and decoding on a device, counted, and measured here",
        "Takes a preset or any Hydra overrides; nothing is trained.\n\n"
        "  deepnarrow roofline 67b --device h100 --tp 8 --out roofline\n"
        "  deepnarrow roofline model=tiny_mha --measure --kv-heads 8,4,1\n\n"
        "Of MHA, GQA and MQA: FLOPs, bytes and arithmetic intensity of prefill and of a decoding step, the least\n"
        "seconds that the device needs for them and what bounds each, the largest batch that fits its memory, and the\n"
        "contexts from which caches cost more than weights. --measure times both by turns, in fp32 on a CPU and in\n"
        "bf16 on a GPU, beside this machine's own roofline. docs/roofline.md says how to read it.",
    ),
    "scaling": (
        "fit scaling laws to your own data: rate, batch, model, tokens and loss by compute",
        "Tries rates and batches at small computes, trains several sizes of model for each of several computes by\n"
        "what came of that, and fits the laws of DeepSeek LLM (arXiv 2401.02954, section 3): the best rate and batch,\n"
        "model and tokens by compute, with intervals, and the loss of the largest predicted from the others.\n\n"
        "  deepnarrow scaling                                    50 small models, on two cores\n"
        "  deepnarrow scaling model=8x512 data=files data.path=/corpus train.micro_batch=8 \\\n"
        "      scaling.budgets=[1e17,3e17,1e18,3e18] scaling.rate_budgets=[3e16,3e17] scaling.batches=[32,64,128] \\\n"
        "      scaling.rates=[5e-4,1e-3,2e-3,4e-3] --print slurm > job\n\n"
        "Takes overrides of every run, and scaling.budgets, scaling.sizes, scaling.shapes, scaling.rates,\n"
        "scaling.batches, scaling.rate_budgets, scaling.seeds, scaling.parallel_runs, scaling.dir, which\n"
        "launch/scaling/settings.py describes. The same command goes on where it was stopped.\n"
        "Ends with scaling.txt, scaling.json and pictures; docs/scaling.md says what each figure means.",
    ),
    "depth-study": (
        "compare deep and narrow models with shallow and wide ones of the same cost",
        "Trains models of other aspects d_model / n_layers, from 8 times the preset's to an eighth, at equal\n"
        "parameters and at equal FLOPs on the same tokens, and sets loss against training speed, decode time,\n"
        "KV cache, and bubble and balance of pipelines.\n\n"
        "  deepnarrow depth-study                                60 small runs, on two cores\n"
        "  deepnarrow depth-study model=67b --plan               its shapes, costs and pipelines; nothing is trained\n"
        "  deepnarrow depth-study model=12x768 data=files data.path=/corpus parallel.dp=8 depth.aspects=[4,1,1/4]\n\n"
        "Takes overrides of every run, and depth.aspects, depth.equal, depth.lrs, depth.seeds, depth.pp,\n"
        "depth.micro_batches, depth.decode_context, depth.decode_batch, depth.parallel_runs, depth.dir, which\n"
        "launch/depth/settings.py describes. The same command goes on where it was stopped.\n"
        "Ends with depth.txt, depth.json and pictures; docs/depth-study.md says what each figure means.",
    ),
    "generate": (
        "complete prompts",
        "Takes a run, a checkpoint or a Hugging Face directory. One prompt streams; several run as a batch.\n\n"
        "  deepnarrow generate runs/tiny-stdlib-574187f --prompt 'def ' --temperature 0.7 --top-p 0.9\n"
        "  deepnarrow generate runs/67b-files-f6aa340 --prompt 'def ' --pp 2 --tp 4\n\n"
        "A model that is too large for one device is cut over --pp x --tp processes, which are started here, or which\n"
        "a launcher has started: torchrun --nproc-per-node 8 --no-python deepnarrow generate RUN --tp 8 ...",
    ),
    "eval": (
        "measure trained weights as a run does: held-out documents, other texts, tasks",
        "Takes a run, a checkpoint or a Hugging Face directory. Without --tasks and --sets it measures what the run\n"
        "does: its held-out documents, and the sets and tasks of its eval section, with the same numbers.\n\n"
        "  deepnarrow eval runs/7b-files-5e0c2f1 --tasks continuation,/tasks/arc.jsonl --shots 5\n"
        "  deepnarrow eval runs/67b-files-f6aa340 --tasks lm_eval/hellaswag --limit 1000 --pp 2 --tp 4 --json\n"
        "  deepnarrow eval deepseek-llm-7b-base --sets pile=/pile/val.jsonl.zst --out pile.json\n\n"
        "Of sets loss, perplexity and bits per byte, which compare between tokenizers; of tasks accuracy and the like\n"
        "(conf/eval_settings.py describes their files). --tasks '{path: a.jsonl, context: question}' names fields of\n"
        "other people's files. A model that is too large for one device is cut over --pp x --tp processes, as for\n"
        "generate. Exit code 1 where a task has failed; the others are asked.",
    ),
    "check": (
        "measure a cluster for seconds before a run, and name what is slow in it",
        "Takes the overrides of the run that it is for.\n\n"
        "  deepnarrow check parallel.pp=2 parallel.tp=2\n"
        "  deepnarrow check --hostfile hosts model=67b parallel.pp=12 parallel.tp=8 --save cluster.yaml\n"
        "  srun deepnarrow check model=67b parallel.pp=12 parallel.tp=8\n\n"
        "All ranks of the layout measure a matrix product, their memory, and the links of its groups, in three\n"
        "rounds of which the best counts: messages to the next stage and back, gathers, scatters and reductions among\n"
        "tensor-parallel ranks and among replicas. A table by host and rank is printed, and whatever is slower than\n"
        "the median of its like by more than --percent is named; the exit code is then 1. --save writes bandwidth and\n"
        "latency into a cluster file, for `deepnarrow plan --cluster FILE` and the key `cluster` of a run.",
    ),
    "bench": (
        "measure what things cost on this machine",
        "Takes overrides, with a subject. Without one: the first six, minutes in all, findings in bench.json.\n\n"
        "  deepnarrow bench stage           training a pipeline stage of the 7B and the 67B (on a CPU a smaller one):\n"
        "                                   tokens/s, MFU, peak memory against what is predicted\n"
        "  deepnarrow bench kernels         attention, loss, norms, rotary positions and SwiGLU, each way they run\n"
        "  deepnarrow bench documents       attention and a stage where documents do not see each other, against\n"
        "                                   whole sequences\n"
        "  deepnarrow bench peers           a forward and backward pass, against transformers, litgpt and torchtitan\n"
        "                                   where they are installed, by turns\n"
        "  deepnarrow bench pipeline        two stages with a core each against one process with both, by turns, and\n"
        "                                   what the bubble allows\n"
        "  deepnarrow bench data            tokens/s of preparation and of loading, against a cluster's consumption\n"
        "  deepnarrow bench checkpoint      seconds that training stands still for a save, in the background and\n"
        "                                   waited for by turns; bytes per parameter on disk\n"
        "  deepnarrow bench decode          a token of 8 sequences of 2048, against transformers' generate\n"
        "  deepnarrow bench schedules       every pipeline schedule by turns, and its bubble against theory\n"
        "  deepnarrow bench start           seconds before the first step: of one process, measured, and an estimate\n"
        "                                   for 512 and 4,096 with what it assumes\n"
        "  deepnarrow bench cluster         products, attention and memory at the model's shapes, as plans count\n"
        "                                   them; --save FILE writes them for `deepnarrow plan --cluster FILE`\n"
        "  deepnarrow bench layouts         steps of layouts on 2 and 4 ranks by turns, against what a plan predicts\n"
        "                                   from this machine's own figures\n"
        "  deepnarrow bench planner         steps that others have measured, against what a plan predicts: by row and\n"
        "                                   source, and the layouts that it would choose",
    ),
    "runs": (
        "list runs: how each is, how far it has come, how fast, and its last checkpoint",
        "Takes folders in which runs are, at any depth, or run folders; ./runs where none is given.\n\n"
        "  deepnarrow runs\n"
        "  deepnarrow runs /shared/runs --watch\n"
        "  deepnarrow runs /shared/runs --json | jq '.[] | select(.state == \"failed\") | .path'\n\n"
        "A run is running where its folder is locked, on whichever host; how it has ended is said by what it and the\n"
        "command that kept it going have left. Of a run on another host over a disk that does not share locks the age\n"
        "of its records is all that there is: running? or silent?, with a question mark. The ETA is by the pace of\n"
        "late, validations and saves included. No checkpoint is opened, and of records the last are read.",
    ),
    "compare": (
        "say which settings of runs differ, where their losses part, and draw both",
        "Takes run folders; the first is what the others are set against.\n\n"
        "  deepnarrow compare runs/7b-files-5e0c2f1 runs/7b-files-a120b7e\n"
        "  deepnarrow compare runs/7b-* --out losses.svg\n\n"
        "Settings that shape the loss curve stand apart from those of the layout and the rest, as do versions of the\n"
        "code. Losses are set side by side at the same tokens, so that runs of different batches compare: the first\n"
        "step at which they differ at all, where they part beyond the noise of a step, and by how much in the end.",
    ),
    "report": (
        "write a page of HTML with the curves of runs, laid over one another",
        "Takes run folders, of runs that go on as well.\n\n"
        "  deepnarrow report runs/7b-files-5e0c2f1\n"
        "  deepnarrow report runs/7b-* --out sevens.html --x hours\n\n"
        "Losses, validation by source, tasks, norms, speed, bubble, memory, saves and failures, what differs between\n"
        "the settings, and the timelines that are kept. Everything is in the one file: no server, account or network\n"
        "is needed to look at it. Values stand under the pointer; what is dragged over is enlarged in all plots.",
    ),
    "dashboard": (
        "make a workspace in W&B with the same plots",
        "Needs an account, and pip install -e '.[dashboard]'.\n\n"
        "  deepnarrow dashboard --project deepnarrow --entity my-team\n"
        "  deepnarrow dashboard --print > workspace.json                 what would be saved; needs no account\n\n"
        "Each call saves a further view of the project, whose address is printed. Runs are found by the names that\n"
        "train/names.py gives to their figures.",
    ),
    "timeline": (
        "draw what every stage of a pipeline did in a step, and what its schedule would have it do",
        "Takes a run folder; train.timeline_at=[10,1000] says which steps a run keeps.\n\n"
        "  deepnarrow timeline runs/tiny-stdlib-574187f --step 10 --out timeline.svg",
    ),
    "rerun": (
        "compute a step of a run again, and say whether hardware or data is at fault",
        "Takes a run folder; the steps from the checkpoint before are taken again, and the step several times on each\n"
        "of several placements of the ranks on this machine's devices, compared to the last bit.\n\n"
        "  deepnarrow rerun runs/67b-files-f6aa340 --step 8120\n\n"
        "Alike everywhere and as recorded: the data or the optimisation is at fault, and it says which samples those\n"
        "are. Otherwise it names the device that computes otherwise than the others, and ends with 1. Of two devices\n"
        "that always differ, it names both.",
    ),
    "inspect": (
        "print what is in checkpoints and whether they are sound",
        "Takes run folders or checkpoints; reads every file.\n\n"
        "  deepnarrow inspect runs/67b-files-f6aa340\n"
        "  deepnarrow inspect runs/67b-files-f6aa340/checkpoints/latest --json",
    ),
}
