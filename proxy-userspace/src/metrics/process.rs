//! The agent as a process, as `/proc/self` has it: the names of the Prometheus client libraries.
#![expect(clippy::cast_precision_loss, reason = "metrics are floating point numbers, and these are small")]

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// Reads `/proc/self` when it is asked.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let stat = Stat::read().unwrap_or_default();
        put_counter(&mut encoder, "process_cpu_seconds", "CPU time used", stat.cpu_seconds)?;
        let gauges = [
            ("process_resident_memory_bytes", "Memory in use", stat.resident_bytes),
            ("process_virtual_memory_bytes", "Address space in use", stat.virtual_bytes),
            ("process_start_time_seconds", "When the process started", stat.started),
            ("process_open_fds", "Open file descriptors", open_descriptors()),
            ("process_max_fds", "How many file descriptors may be open", max_descriptors()),
        ];
        gauges.into_iter().try_for_each(|(name, what, value)| put_gauge(&mut encoder, name, what, value))
    }
}

fn put_counter(encoder: &mut DescriptorEncoder, name: &str, what: &str, value: f64) -> fmt::Result {
    let counter = ConstCounter::new(value);
    counter.encode(encoder.encode_descriptor(name, what, None, counter.metric_type())?)
}

fn put_gauge(encoder: &mut DescriptorEncoder, name: &str, what: &str, value: f64) -> fmt::Result {
    let gauge = ConstGauge::new(value);
    gauge.encode(encoder.encode_descriptor(name, what, None, gauge.metric_type())?)
}

/// From `/proc/self/stat` (`proc_pid_stat(5)`).
#[derive(Clone, Copy, Debug, Default)]
struct Stat {
    cpu_seconds: f64,
    virtual_bytes: f64,
    resident_bytes: f64,
    /// Seconds since 1970.
    started: f64,
}

impl Stat {
    fn read() -> Option<Self> {
        let text = fs::read_to_string("/proc/self/stat").ok()?;
        // The second field is the program's name, which may have spaces in it; what follows begins with the third.
        let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
        let field = |number: usize| fields.get(number - 3)?.trim().parse::<f64>().ok();
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        Some(Self {
            cpu_seconds: (field(14)? + field(15)?) / ticks,
            virtual_bytes: field(23)?,
            resident_bytes: field(24)? * rustix::param::page_size() as f64,
            started: booted()? + field(22)? / ticks,
        })
    }
}

/// Seconds since 1970.
fn booted() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("btime "))?.parse().ok()
}

fn open_descriptors() -> f64 {
    fs::read_dir("/proc/self/fd").map_or(0.0, |entries| entries.count() as f64)
}

fn max_descriptors() -> f64 {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current.map_or(f64::INFINITY, |limit| limit as f64)
}
