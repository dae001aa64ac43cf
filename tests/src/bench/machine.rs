//! The machine that measures: which one it is, one processor of it, and where its figures are kept.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::chart;

/// Where and when.
#[derive(Clone, Debug)]
pub struct Machine {
    date: String,
    kernel: String,
    processor: String,
}

impl Machine {
    /// This one, now.
    pub fn here() -> Result<Self> {
        let processors = fs::read_to_string("/proc/cpuinfo")?;
        let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Ok(Self {
            date: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            processor: model.map_or("unknown", |(_, name)| name).to_owned(),
        })
    }

    /// In a line.
    pub fn line(&self) -> String {
        let Self { date, kernel, processor } = self;
        format!("{date}, Linux {kernel}, {processor}")
    }

    /// Writes figures of this machine's, which are an object, into `PART.json`, and draws them; returns where.
    pub fn write(&self, directory: &Path, part: &str, mut figures: Value) -> Result<PathBuf> {
        figures["date"] = json!(self.date);
        figures["kernel"] = json!(self.kernel);
        figures["processor"] = json!(self.processor);
        let file = directory.join(format!("{part}.json"));
        let write = || fs::create_dir_all(directory).and_then(|()| fs::write(&file, format!("{figures:#}\n")));
        write().with_context(|| format!("cannot write {}", file.display()))?;
        chart::write(directory, part, &figures)?;
        Ok(file)
    }
}

/// Tables keep free entries for each processor, and caches are a processor's own. Threads and processes made later stay there, too.
pub fn stay_on_one_processor() -> Result<()> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    let last = (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(last.context("no processor to run on")?)?;
    Ok(sched_setaffinity(this, &one)?)
}
