//! How long each verb takes where there is much.

use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike as _,
};
use proxy_common::{
    addr::{Ipv4, Port, Protocol},
    backend::{Backend, BackendState},
    names::{ServiceName, Text},
    service::{Frontend, Range, Service},
};
use proxy_userspace::{
    dataplane::{Dataplane, Options},
    diff::{Plan, Step},
};
use tests::{
    patience::{is_shipped, patience},
    sandbox::Sandbox,
};

use crate::node::run;

/// So many Services of three endpoints each, without an agent.
fn fill(sandbox: &Sandbox, count: u32) -> Result<()> {
    let mut options = Options::new(sandbox.pins.path());
    options.cgroup = Some(sandbox.cgroup.path().to_owned());
    let mut plan = Plan::default();
    let mut names = Vec::new();
    for number in 1..=count {
        let [_, b, c, d] = number.to_be_bytes();
        let backend = |last: u8| Backend {
            addr: Ipv4 { octets: [20 + last, b, c, d] },
            port: Port::new(8080),
            state: BackendState::Serving,
            generation: 1,
            ..Backend::default()
        };
        let first = number * 3;
        plan.v4.extend((0..3).map(|last| Step::PutBackend(first + u32::from(last), backend(last))));
        plan.v4.push(Step::PutSlots(first, (first..first + 3).collect()));
        let range = Range { first, count: 3 };
        let service = Service { index: number, internal: range, external: range, ..Service::default() };
        let frontend = Frontend::new(Ipv4 { octets: [10, b, c, d] }, Port::new(80), Protocol::Tcp);
        plan.v4.push(Step::PutService(frontend, service));
        let name = Text::new(&format!("service-{number}"));
        names.push((number, ServiceName { namespace: Text::new("many"), name, port: Text::EMPTY }));
    }
    sandbox.namespace.run(|| -> Result<()> {
        let mut dataplane = Dataplane::open(&options)?;
        dataplane.put_names(&names, &[])?;
        Ok(dataplane.apply(&plan)?)
    })?
}

/// Milliseconds. What is built without optimisation takes several times as long as what is shipped.
fn limit() -> u64 {
    if is_shipped() { 200 } else { 1_000 }
}

/// Of those that have ended.
fn processor_time_of_children() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let time = usage.user_time() + usage.system_time();
    Ok(Duration::from_micros(time.num_microseconds().try_into()?))
}

#[test]
fn each_verb_answers_within_200_ms_with_10_000_services() -> Result<()> {
    let sandbox = Sandbox::new()?;
    fill(&sandbox, 10_000)?;
    let verbs: [&[&str]; 11] = [
        &["status"],
        &["counters"],
        &["service", "list"],
        &["service", "get", "many/service-7"],
        &["backend", "list"],
        &["backend", "list", "-o", "json"],
        &["flow", "list"],
        &["affinity", "list"],
        &["top", "--once"],
        &["monitor", "--count", "0"],
        &["cleanup", "--dry-run"],
    ];
    for words in verbs {
        // What others do on this machine meanwhile is not the verb's: what it had of a processor, in the best of five.
        let time = |_| -> Result<Duration> {
            let before = processor_time_of_children()?;
            let output = run(&sandbox, words)?;
            ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(processor_time_of_children()?.saturating_sub(before))
        };
        let times = (0..5).map(time).collect::<Result<Vec<_>>>()?;
        let best = times.into_iter().min().unwrap_or_default();
        println!("{words:?}: {best:?}");
        ensure!(best < patience(Duration::from_millis(limit())), "{words:?} takes {best:?}");
    }
    Ok(())
}
