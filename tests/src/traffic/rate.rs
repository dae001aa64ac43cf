//! Short TCP connections at a steady rate.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{Ask, Failure, RatePlan, RateReport, client::Connection};

/// Enough for a thousand connections per second of which each takes up to 30 ms.
const WORKERS: usize = 32;

/// Connections under way.
#[derive(Debug)]
pub struct Rate {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<RateReport>>,
}

#[derive(Debug)]
struct Shared {
    plan: RatePlan,
    start: Instant,
    next: AtomicU64,
    is_ending: AtomicBool,
}

impl Rate {
    /// Begins to connect.
    pub fn start(plan: RatePlan) -> Self {
        let (next, is_ending) = (AtomicU64::new(0), AtomicBool::new(false));
        let shared = Arc::new(Shared { plan, start: Instant::now(), next, is_ending });
        let worker = |shared: Arc<Shared>| thread::spawn(move || work(&shared));
        let workers = (0..WORKERS).map(|_| worker(Arc::clone(&shared))).collect();
        Self { shared, workers }
    }

    /// Lets the last connections end and says what happened.
    pub fn finish(self) -> RateReport {
        let elapsed = self.shared.start.elapsed();
        self.shared.is_ending.store(true, Ordering::Relaxed);
        let mut total = RateReport { elapsed, ..Default::default() };
        for report in self.workers.into_iter().filter_map(|worker| worker.join().ok()) {
            add(&mut total, report);
        }
        total
    }
}

fn add(total: &mut RateReport, report: RateReport) {
    total.begun += report.begun;
    total.answered += report.answered;
    total.handshake_retransmits += report.handshake_retransmits;
    total.retransmits += report.retransmits;
    total.slowest = total.slowest.max(report.slowest);
    for (failure, count) in report.failures {
        *total.failures.entry(failure).or_default() += count;
    }
    for (pod, count) in report.pods {
        *total.pods.entry(pod).or_default() += count;
    }
}

/// Takes the next place in the schedule, waits for its time, connects.
fn work(shared: &Shared) -> RateReport {
    let mut report = RateReport::default();
    loop {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        let due = shared.start + Duration::from_micros(number * 1_000_000 / u64::from(shared.plan.per_second));
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if shared.is_ending.load(Ordering::Relaxed) {
            return report;
        }
        report.begun += 1;
        if let Err(failure) = connect_once(&shared.plan, &mut report) {
            *report.failures.entry(failure.to_string()).or_default() += 1;
        }
    }
}

fn connect_once(plan: &RatePlan, report: &mut RateReport) -> Result<(), Failure> {
    let mut connection = Connection::open(&Ask::new(plan.target).within(plan.timeout).acknowledging_late())?;
    report.handshake_retransmits += connection.retransmits();
    let answer = connection.ask()?;
    report.retransmits += connection.retransmits();
    report.slowest = report.slowest.max(answer.latency);
    report.answered += 1;
    *report.pods.entry(answer.pod).or_default() += 1;
    Ok(())
}
