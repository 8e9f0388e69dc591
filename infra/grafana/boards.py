"""The four dashboards: what each panel asks, and what good looks like there.

Every series is in the table of docs/reference.md. Names with colons are recorded by infra/prometheus/convmae.rules.yml.
"""

from __future__ import annotations

from infra.grafana.panels import RUN, Board, Figure, Graph, Query, Section

RATE = "$__rate_interval"
BY_RANK = "{{run}} rank {{rank}}"
BY_PROBE = "{{run}} {{probe}}"
BY_GPU = "{{Hostname}}{{hostname}} GPU {{gpu}}"
"""DCGM's exporter writes the one up to 4.8.2, the other after; a label that is not there is empty."""


def _of(series: str) -> Query:
    return Query(f"{series}{{{RUN}}}")


def _rate(series: str, legend: str = "{{run}}") -> Query:
    return Query(f"rate({series}{{{RUN}}}[{RATE}])", legend)


def _by_rank(series: str) -> Query:
    return Query(f"convmae_rank_{series}{{{RUN}}}", BY_RANK)


OVERVIEW = Board(
    "convmae-overview",
    "ConvMAE: overview",
    "Where each run stands, how fast it goes, and whether its loss is well.",
    [
        Section(
            "Now",
            [
                Figure(
                    "Progress",
                    "Share of all steps.",
                    "percentunit",
                    Query(f"convmae_step{{{RUN}}} / convmae_total_steps"),
                    decimals=1,
                ),
                Figure("Time left", "At the speed of the last 20 steps.", "s", _of("convmae_eta_seconds")),
                Figure("Loss", "Of the last step.", "short", _of("convmae_loss"), decimals=4),
                Figure(
                    "Images per second",
                    "All ranks, last 20 steps.",
                    "short",
                    _of("convmae_images_per_second"),
                    decimals=0,
                ),
                Figure(
                    "Ranks missing",
                    "Of max_workers; all are missing while a group restarts.",
                    "short",
                    Query(f"convmae_target_world_size_ranks{{{RUN}}} - convmae_world_size_ranks"),
                    {1: "orange"},
                ),
                Figure(
                    "Alerts",
                    "Firing now; docs/runbook.md says what to do about each.",
                    "short",
                    Query('count(ALERTS{alertname=~"Convmae.*", alertstate="firing"}) or vector(0)', "alerts"),
                    {1: "red"},
                ),
                Figure(
                    "Last step",
                    "Seconds ago.",
                    "s",
                    Query(f"convmae:step_age:seconds{{{RUN}}}"),
                    {120: "orange", 600: "red"},
                ),
                Figure("Newest checkpoint", "Seconds ago.", "s", Query(f"convmae:checkpoint_age:seconds{{{RUN}}}")),
                Figure(
                    "Waiting for data",
                    "Share of time, the slowest rank.",
                    "percentunit",
                    _of("convmae_data_wait_ratio"),
                    {0.05: "orange", 0.2: "red"},
                    decimals=1,
                ),
                Figure(
                    "Restarts",
                    "Since the run began.",
                    "short",
                    Query(f"sum by (run) (convmae_restarts_total{{{RUN}}})"),
                    {1: "orange"},
                ),
                Figure(
                    "GPU-hours",
                    "Hours that ranks trained, summed over them.",
                    "short",
                    Query(f"convmae_worker_seconds_total{{{RUN}}} / 3600"),
                    decimals=1,
                ),
                Figure(
                    "Samples unusable",
                    "In the quarantine ledger.",
                    "short",
                    _of("convmae_quarantined_samples"),
                    {1: "orange"},
                ),
            ],
        ),
        Section(
            "Learning",
            [
                Graph(
                    "Loss",
                    "Falls over hundreds of steps; no jump at a restart.",
                    "short",
                    [_of("convmae_loss")],
                    floor=None,
                ),
                Graph(
                    "Gradient norm",
                    "Finite, no trend upwards.",
                    "short",
                    [_of("convmae_gradient_norm")],
                    logarithmic=True,
                ),
                Graph("Learning rate", "Linear warm-up, half-cosine to zero.", "sci", [_of("convmae_learning_rate")]),
                Graph(
                    "Accuracy",
                    "By kNN and a linear probe on labelled samples; rises over epochs, above that before training.",
                    "percentunit",
                    [
                        Query(f"convmae_probe_accuracy_ratio{{{RUN}}}", BY_PROBE),
                        Query(f"convmae_probe_control_accuracy_ratio{{{RUN}}}", f"{BY_PROBE} before training"),
                    ],
                    12,
                    floor=None,
                ),
                Graph(
                    "Accuracy of kNN, k = 20",
                    "With its 95 % interval; an alert says when it falls below what it was.",
                    "percentunit",
                    [
                        Query(f'convmae_probe_accuracy_ratio{{{RUN}, probe="knn_20"}}'),
                        Query(f'convmae_probe_accuracy_low_ratio{{{RUN}, probe="knn_20"}}', "{{run}} low"),
                        Query(f'convmae_probe_accuracy_high_ratio{{{RUN}, probe="knn_20"}}', "{{run}} high"),
                    ],
                    12,
                    floor=None,
                ),
                Graph(
                    "Validation accuracy",
                    "Of a fine-tuning, with its 95 % interval; rises over epochs. The same alert says when it falls.",
                    "percentunit",
                    [
                        _of("convmae_validation_accuracy_ratio"),
                        Query(f"convmae_validation_accuracy_low_ratio{{{RUN}}}", "{{run}} low"),
                        Query(f"convmae_validation_accuracy_high_ratio{{{RUN}}}", "{{run}} high"),
                        Query(f"convmae_validation_top_five_ratio{{{RUN}}}", "{{run}} among five"),
                    ],
                    24,
                    floor=None,
                ),
            ],
        ),
        Section(
            "Speed",
            [
                Graph(
                    "Images per second",
                    "Of the last 20 steps; and over five minutes, in which restarts count.",
                    "short",
                    [
                        _of("convmae_images_per_second"),
                        Query(f"convmae:images:rate5m{{{RUN}}}", "{{run}} over 5 min"),
                    ],
                ),
                Graph(
                    "Ranks",
                    "What trains, and what the run would take.",
                    "short",
                    [
                        _of("convmae_world_size_ranks"),
                        Query(f"convmae_target_world_size_ranks{{{RUN}}}", "{{run}} wanted"),
                    ],
                ),
                Graph(
                    "Predicted end",
                    "Level; a rise says that the run gets slower.",
                    "dateTimeAsIso",
                    [Query(f"1000 * convmae:finish:timestamp_seconds{{{RUN}}}")],
                    floor=None,
                ),
                Graph(
                    "MFU",
                    "Model operations, of what the devices' peak allows; steady at any number of workers.",
                    "percentunit",
                    [_of("convmae_mfu_ratio")],
                    12,
                ),
                Graph(
                    "FLOP/s of a device",
                    "Operations of the model alone; steady at any number of workers.",
                    "flops",
                    [_of("convmae_device_flops_per_second")],
                    12,
                ),
            ],
        ),
    ],
)

DATA_PLANE = Board(
    "convmae-data",
    "ConvMAE: data plane",
    "Whether images come in time, from where, and what is wrong with them.",
    [
        Section(
            "Waiting",
            [
                Graph(
                    "Waiting for data",
                    "Share of time of the slowest rank; near zero.",
                    "percentunit",
                    [
                        _of("convmae_data_wait_ratio"),
                        Query(f"convmae:data_wait:ratio10m{{{RUN}}}", "{{run}} over 10 min"),
                    ],
                    12,
                ),
                Graph(
                    "Wait of each rank",
                    "Seconds of the last step; one above the others has a slow node.",
                    "s",
                    [_by_rank("data_wait_seconds")],
                    12,
                ),
            ],
        ),
        Section(
            "Object store",
            [
                Graph(
                    "Requests", "Ranged reads a second, all ranks.", "reqps", [_rate("convmae_storage_requests_total")]
                ),
                Graph("Throughput", "Bytes a second, all ranks.", "Bps", [_rate("convmae_storage_read_bytes_total")]),
                Graph(
                    "Bytes a request",
                    "4 to 8 MB where blocks are read whole.",
                    "bytes",
                    [Query(f"convmae:storage_request:bytes5m{{{RUN}}}")],
                ),
                Graph(
                    "Requests of each rank",
                    "Since its worker started; even.",
                    "short",
                    [_by_rank("storage_requests")],
                    12,
                ),
                Graph(
                    "Bytes of each rank",
                    "Since its worker started; even.",
                    "bytes",
                    [_by_rank("storage_read_bytes")],
                    12,
                ),
            ],
        ),
        Section(
            "Disk cache",
            [
                Graph(
                    "Hits",
                    "Share of reads that disks served; from the second epoch on that of the lanes that fit.",
                    "percentunit",
                    [Query(f"convmae:block_cache_hits:ratio5m{{{RUN}}}")],
                ),
                Graph("Size", "Bytes on the disk of rank 0's node.", "bytes", [_of("convmae_block_cache_bytes")]),
                Graph(
                    "Evicted and damaged",
                    "Blocks a second; zero but when lanes move.",
                    "short",
                    [
                        _rate("convmae_block_cache_evictions_total", "{{run}} evicted"),
                        _rate("convmae_block_cache_damaged_total", "{{run}} damaged"),
                    ],
                ),
                Graph(
                    "Hits of each rank",
                    "Since its worker started.",
                    "short",
                    [
                        _by_rank("block_cache_hits"),
                        Query(f"convmae_rank_block_cache_misses{{{RUN}}}", f"{BY_RANK} missed"),
                    ],
                    12,
                ),
                Graph(
                    "Ranks without a cache",
                    "Their disk is full or broken.",
                    "short",
                    [_of("convmae_block_cache_off_ranks")],
                    12,
                ),
            ],
        ),
        Section(
            "Samples that cannot be used",
            [
                Graph(
                    "Quarantined",
                    "Distinct samples; `convmae quarantine RUN` lists them.",
                    "short",
                    [_of("convmae_quarantined_samples")],
                    12,
                ),
                Graph(
                    "Replaced",
                    "Samples a second, redone ones included.",
                    "short",
                    [_rate("convmae_substitutions_total")],
                    12,
                ),
            ],
        ),
    ],
)

RECOVERY = Board(
    "convmae-recovery",
    "ConvMAE: recovery and checkpoints",
    "What failed, what it cost, and how much would be lost now.",
    [
        Section(
            "Failures",
            [
                Graph(
                    "Failures",
                    "Of the worker group in the last hour, by the class of their cause.",
                    "short",
                    [Query(f"increase(convmae_failures_total{{{RUN}}}[1h])", "{{run}} {{cause}}")],
                ),
                Graph(
                    "Restarts",
                    "In the last hour, by reason.",
                    "short",
                    [Query(f"increase(convmae_restarts_total{{{RUN}}}[1h])", "{{run}} {{reason}}")],
                ),
                Graph("Ranks", "Zero while a group restarts.", "short", [_of("convmae_world_size_ranks")]),
                Graph(
                    "Step",
                    "Falls back at a restart to the newest checkpoint.",
                    "short",
                    [_of("convmae_step"), Query(f"convmae_checkpoint_step{{{RUN}}}", "{{run}} saved")],
                    12,
                ),
                Graph("Steps redone", "Since the run began.", "short", [_of("convmae_steps_redone_total")], 12),
            ],
        ),
        Section(
            "Checkpoints",
            [
                Graph(
                    "Steps at risk",
                    "What a failure now would redo; below two intervals.",
                    "short",
                    [
                        Query(f"convmae_step{{{RUN}}} - convmae_checkpoint_step"),
                        Query(f"convmae:checkpoint_interval:steps{{{RUN}}}", "{{run}} interval"),
                    ],
                ),
                Graph(
                    "Age",
                    "Of the newest one; below two intervals while it trains.",
                    "s",
                    [
                        Query(f"convmae:checkpoint_age:seconds{{{RUN}}}"),
                        Query(f"convmae:checkpoint_interval:steps{{{RUN}}} * convmae:step:seconds", "{{run}} interval"),
                    ],
                ),
                Graph(
                    "Committed and failed",
                    "In the last hour.",
                    "short",
                    [
                        Query(f"increase(convmae_checkpoints_total{{{RUN}}}[1h])", "{{run}} committed"),
                        Query(f"increase(convmae_checkpoint_failures_total{{{RUN}}}[1h])", "{{run}} failed"),
                    ],
                ),
                Graph(
                    "Duration",
                    "From its beginning to its commit; below the interval.",
                    "s",
                    [_of("convmae_checkpoint_duration_seconds")],
                    6,
                ),
                Graph(
                    "Stall",
                    "Seconds that training paused for the newest one.",
                    "s",
                    [_of("convmae_checkpoint_last_stall_seconds")],
                    6,
                ),
                Graph(
                    "Share of time stalled",
                    "Below 2 %.",
                    "percentunit",
                    [Query(f"convmae:checkpoint_stall:ratio1h{{{RUN}}}")],
                    6,
                ),
                Graph("Size", "Of the newest one.", "bytes", [_of("convmae_checkpoint_bytes")], 6),
            ],
        ),
    ],
)

NODES = Board(
    "convmae-nodes",
    "ConvMAE: nodes and GPUs",
    "Ranks from the run itself, nodes from Ray's metrics, GPUs from DCGM's exporter.",
    [
        Section(
            "Ranks",
            [
                Graph("Step time", "The same for all, which wait for each other.", "s", [_by_rank("step_seconds")]),
                Graph(
                    "Memory", "Of each worker's process; level after some minutes.", "bytes", [_by_rank("memory_bytes")]
                ),
                Graph(
                    "GPU memory", "Most that PyTorch held; zero on a CPU.", "bytes", [_by_rank("device_memory_bytes")]
                ),
                Graph(
                    "Free disk",
                    "Of the fullest disk that the worker writes to; above 10 %.",
                    "percentunit",
                    [_by_rank("disk_free_ratio")],
                    24,
                ),
            ],
        ),
        Section(
            "Nodes (Ray)",
            [
                Graph("CPU", "Busy share in per cent.", "percent", [Query("ray_node_cpu_utilization", "{{instance}}")]),
                Graph(
                    "Memory",
                    "Used share.",
                    "percentunit",
                    [Query("ray_node_mem_used / ray_node_mem_total", "{{instance}}")],
                ),
                Graph(
                    "Disk",
                    "Used share.",
                    "percentunit",
                    [Query("ray_node_disk_usage / (ray_node_disk_usage + ray_node_disk_free)", "{{instance}}")],
                ),
                Graph(
                    "Network in",
                    "Bytes a second.",
                    "Bps",
                    [Query("ray_node_network_receive_speed", "{{instance}}")],
                    12,
                ),
                Graph(
                    "Network out", "Bytes a second.", "Bps", [Query("ray_node_network_send_speed", "{{instance}}")], 12
                ),
            ],
        ),
        Section(
            "GPUs (DCGM)",
            [
                Graph(
                    "Busy",
                    "Share of time with a kernel; steady near 100.",
                    "percent",
                    [Query("DCGM_FI_DEV_GPU_UTIL", BY_GPU)],
                ),
                Graph(
                    "Tensor cores",
                    "Share of cycles; what bf16 is for.",
                    "percentunit",
                    [Query("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", BY_GPU)],
                ),
                Graph(
                    "Memory",
                    "Used share.",
                    "percentunit",
                    [Query("DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)", BY_GPU)],
                ),
                Graph(
                    "Power",
                    "Watts; one below the others is throttled or idle.",
                    "watt",
                    [Query("DCGM_FI_DEV_POWER_USAGE", BY_GPU)],
                ),
                Graph(
                    "Temperature",
                    "Below the card's limit.",
                    "celsius",
                    [Query("DCGM_FI_DEV_GPU_TEMP", BY_GPU)],
                ),
                Graph(
                    "Last XID",
                    "Zero; NVIDIA's table says what each number means.",
                    "short",
                    [Query("DCGM_FI_DEV_XID_ERRORS", BY_GPU)],
                ),
            ],
        ),
    ],
)

BOARDS = (OVERVIEW, DATA_PLANE, RECOVERY, NODES)
