//! Many questions at once, so that those which nobody answers wait side by side.

use std::{
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    thread,
    time::Instant,
};

use super::{Ask, Findings, Inquiry, client::ask};

/// Most of them only wait.
const WORKERS: usize = 32;

/// What was found about each, in the order of the questions.
pub fn inquire(inquiries: &[Inquiry]) -> Vec<Findings> {
    let waiting = Mutex::new(inquiries.iter().enumerate());
    let found = Mutex::new(Vec::new());
    let work = || {
        while let Some((number, inquiry)) = locked(&waiting, Iterator::next) {
            let findings = one(inquiry);
            locked(&found, |found| found.push((number, findings)));
        }
    };
    thread::scope(|scope| (0..WORKERS.min(inquiries.len())).for_each(|_| drop(scope.spawn(work))));
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by_key(|(number, _)| *number);
    found.into_iter().map(|(_, findings)| findings).collect()
}

/// Holds the lock no longer than `use_it` takes.
fn locked<T, R>(shared: &Mutex<T>, use_it: impl FnOnce(&mut T) -> R) -> R {
    use_it(&mut shared.lock().unwrap_or_else(PoisonError::into_inner))
}

fn one(inquiry: &Inquiry) -> Findings {
    let mut findings = Findings { answers: Vec::new(), failure: None };
    for number in 0..inquiry.times {
        let start = Instant::now();
        match ask(&further(inquiry.ask, number)) {
            Ok(answer) => findings.answers.push(answer),
            Err(failure) => {
                findings.failure = Some((failure, start.elapsed()));
                break;
            }
        }
    }
    findings
}

/// The same request so many ports further.
fn further(ask: Ask, ports: u16) -> Ask {
    let source = ask.source.map(|source| SocketAddr::new(source.ip(), source.port() + ports));
    Ask { source, ..ask }
}
