//! What the kernel's queues have dropped for want of room or time: on a machine that stands still for a moment, a packet is lost that no
//! program has seen. A run in which that happened says nothing about who else loses packets.

use std::fs;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::Lab;

/// How often something is tried until a run says something.
const TRIES: u32 = 3;

impl Lab {
    /// Packets that were dropped by queues since the machine and the lab began: by those of processors, which all namespaces share, and by
    /// those of the lab's devices.
    fn dropped_by_queues(&self) -> Result<u64> {
        let own = self.places().chain([&self.gateway]).map(|place| {
            let output = place.namespace().command("ip")?.args(["-statistics", "-json", "link"]).output()?;
            let devices: Vec<Value> = serde_json::from_slice(&output.stdout).context("not what `ip` prints")?;
            let dropped = |device: &Value, way: &str| device["stats64"][way]["dropped"].as_u64().unwrap_or(0);
            Ok(devices.iter().map(|device| dropped(device, "rx") + dropped(device, "tx")).sum::<u64>())
        });
        Ok(own.sum::<Result<u64>>()? + of_processors()?)
    }

    /// Tries something that loses no packet, again where it did and the kernel's queues have lost some meanwhile.
    pub fn without_dropping_queues(&self, mut run: impl FnMut() -> Result<()>) -> Result<()> {
        for _ in 1..TRIES {
            let before = self.dropped_by_queues()?;
            let result = run();
            let dropped = self.dropped_by_queues()?.saturating_sub(before);
            match result {
                Err(error) if dropped > 0 => {
                    eprintln!("once more, because queues of this machine have dropped {dropped} packets: {error:#}");
                }
                result => return result,
            }
        }
        run()
    }
}

/// The second column of each processor's line, in hexadecimal (`softnet_seq_show` in net/core/net-procfs.c).
fn of_processors() -> Result<u64> {
    let text = fs::read_to_string("/proc/net/softnet_stat")?;
    let dropped = text.lines().filter_map(|line| line.split_whitespace().nth(1));
    Ok(dropped.filter_map(|number| u64::from_str_radix(number, 16).ok()).sum())
}
