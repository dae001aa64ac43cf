//! Traffic of every kind on a lab at once, while something happens to it: numbered datagrams and short connections, by a pod's
//! device, by either kind of uplink, and by the sockets of a node.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{address::Family, cluster::Cluster, manifest::Service};
use crate::{
    patience::{patience, slowness},
    traffic::{
        Protocol, RatePlan, StreamPlan,
        place::{Activity, Place},
    },
};

/// Datagrams per second of each stream. Of fewer than a [`StreamPlan`]'s sender makes of a few milliseconds, there would be none.
const DATAGRAMS: u32 = 500;
/// Connections per second of each way.
const CONNECTIONS: u32 = 50;

/// What goes on until it is finished.
#[derive(Debug)]
pub struct Load<'lab> {
    streams: Vec<(&'static str, Activity<'lab>)>,
    rates: Vec<(&'static str, Activity<'lab>)>,
}

fn per_second(usual: u32) -> u32 {
    (Duration::from_secs(1).div_f64(slowness()).as_millis() as u32 * usual).div_ceil(1_000)
}

/// Numbered datagrams to a Service: by a pod's device of node-a, and by each node's uplink. So many per second of each.
pub fn streams<'lab>(
    cluster: &'lab Cluster,
    service: &Service,
    usual: u32,
) -> Result<Vec<(&'static str, Activity<'lab>)>> {
    let [a, b] = &cluster.lab.nodes;
    let outside = &cluster.lab.client;
    let ways = [
        ("by a pod's device", cluster.lab.place("client-a")?, service.cluster(Family::V4, Protocol::Udp)),
        ("by the uplink of node-a", outside, service.at_node(a.addresses(), Family::V4, Protocol::Udp)),
        ("by the uplink of node-b", outside, service.at_node(b.addresses(), Family::V6, Protocol::Udp)),
    ];
    let plan = |target| StreamPlan {
        target,
        per_second: per_second(usual).max(DATAGRAMS),
        linger: patience(Duration::from_secs(2)),
    };
    ways.into_iter().map(|(name, client, target)| Ok((name, client.stream(plan(target))?))).collect()
}

/// Short connections to a Service: by each node's uplink, and by sockets of node-a. So many per second of each.
pub fn rates<'lab>(
    cluster: &'lab Cluster,
    service: &Service,
    usual: u32,
) -> Result<Vec<(&'static str, Activity<'lab>)>> {
    let [a, b] = &cluster.lab.nodes;
    let outside = &cluster.lab.client;
    let ways: [(_, &Place, _); 3] = [
        ("by the uplink of node-a", outside, service.at_node(a.addresses(), Family::V4, Protocol::Tcp)),
        ("by the uplink of node-b", outside, service.at_node(b.addresses(), Family::V6, Protocol::Tcp)),
        ("by sockets of node-a", &a.host, service.cluster(Family::V4, Protocol::Tcp)),
    ];
    let plan = |target| RatePlan { target, per_second: per_second(usual), timeout: patience(Duration::from_secs(20)) };
    ways.into_iter().map(|(name, client, target)| Ok((name, client.rate(plan(target))?))).collect()
}

impl<'lab> Load<'lab> {
    /// Begins.
    pub fn begin(cluster: &'lab Cluster, service: &Service) -> Result<Self> {
        let streams = streams(cluster, service, DATAGRAMS)?;
        Ok(Self { streams, rates: rates(cluster, service, CONNECTIONS)? })
    }

    /// Goes on for a while.
    pub fn go_on(&self, usual: Duration) {
        std::thread::sleep(patience(usual));
    }

    /// Ends, and insists that nothing was lost, refused, reset or answered by anybody else: datagrams and connections there were.
    pub fn finish_unhurt(self) -> Result<(u64, u64)> {
        let (mut datagrams, mut connections) = (0, 0);
        for (name, stream) in self.streams {
            let report = stream.finish_stream()?;
            let harm = (report.lost(), report.duplicated, report.errors);
            ensure!(harm == (0, 0, 0) && report.sent > 0, "datagrams {name}: {report:?}");
            ensure!(report.pods.len() == 1, "datagrams {name} have changed their backend: {:?}", report.pods);
            datagrams += report.sent;
        }
        for (name, rate) in self.rates {
            let report = rate.finish_rate()?;
            ensure!(report.failures.is_empty() && report.answered > 0, "connections {name}: {report:?}");
            ensure!(report.answered == report.begun, "connections {name}: {report:?}");
            connections += report.begun;
        }
        Ok((datagrams, connections))
    }
}
