//! A stream of numbered UDP datagrams at a steady rate, on one socket.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    StreamPlan, StreamReport,
    socket::{any_like, datagram},
};

/// How often datagrams leave: those that are due by then go together.
const TICK: Duration = Duration::from_millis(1);

/// Ticks that may be made up for at once. A sender that was kept from sending must not make a burst of what it missed:
/// queues on the way are short (256 frames in a veth's ring), and what they lose nobody else has lost.
const TICKS_AT_ONCE: u32 = 4;

/// Gaps that a report lists.
const GAPS: usize = 16;

/// A stream under way.
#[derive(Debug)]
pub struct Stream {
    progress: Arc<Progress>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<StreamReport>,
}

#[derive(Debug, Default)]
struct Progress {
    is_ending: AtomicBool,
    is_over: AtomicBool,
    sent: AtomicU64,
    answered: AtomicU64,
}

impl Stream {
    /// Begins to send.
    pub fn start(plan: StreamPlan) -> io::Result<Self> {
        let socket = datagram(SocketAddr::new(any_like(plan.target.address.ip()), 0))?;
        socket.connect(plan.target.address)?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let socket = Arc::new(socket);
        let progress = Arc::new(Progress::default());
        let (sending, shared) = (Arc::clone(&socket), Arc::clone(&progress));
        let sender = thread::spawn(move || send(&sending, plan, &shared));
        let shared = Arc::clone(&progress);
        let receiver = thread::spawn(move || receive(&socket, &shared));
        Ok(Self { progress, sender, receiver })
    }

    /// Stops sending, waits for the last answers, and says what happened.
    pub fn finish(self, linger: Duration) -> Option<StreamReport> {
        self.progress.is_ending.store(true, Ordering::Relaxed);
        let errors = self.sender.join().ok()?;
        let sent = self.progress.sent.load(Ordering::Relaxed);
        let deadline = Instant::now() + linger;
        while self.progress.answered.load(Ordering::Relaxed) < sent && Instant::now() < deadline {
            thread::sleep(TICK);
        }
        self.progress.is_over.store(true, Ordering::Relaxed);
        let mut report = self.receiver.join().ok()?;
        report.sent = sent;
        report.errors += errors;
        Some(report)
    }
}

/// Sends what is due at each tick; returns the number of errors.
fn send(socket: &UdpSocket, plan: StreamPlan, progress: &Progress) -> u64 {
    let (mut start, mut number, mut due, mut errors) = (Instant::now(), 0, 0, 0);
    while !progress.is_ending.load(Ordering::Relaxed) {
        let pending = start.elapsed().min(TICK * TICKS_AT_ONCE);
        let count = (pending.as_micros() * u128::from(plan.per_second) / 1_000_000) as u64;
        // The fraction of a datagram that is due as well waits for the next tick.
        let rest = pending.saturating_sub(Duration::from_micros(count * 1_000_000 / u64::from(plan.per_second)));
        start = Instant::now().checked_sub(rest).unwrap_or(start);
        due += count;
        while number < due {
            // An ICMP error that has come in is reported once, in place of sending.
            if let Err(error) = socket.send(number.to_string().as_bytes()) {
                eprintln!("datagram {number} did not leave at first: {error}");
                errors += 1;
                break;
            }
            number += 1;
            progress.sent.store(number, Ordering::Relaxed);
        }
        thread::sleep(TICK);
    }
    errors
}

fn receive(socket: &UdpSocket, progress: &Progress) -> StreamReport {
    let (mut report, mut seen, mut highest) = (StreamReport::default(), Vec::new(), 0);
    let mut buffer = [0; 512];
    while !progress.is_over.load(Ordering::Relaxed) {
        match socket.recv(&mut buffer) {
            Ok(length) => {
                note(&String::from_utf8_lossy(&buffer[..length]), &mut report, &mut seen, &mut highest);
                progress.answered.store(report.answered, Ordering::Relaxed);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(_) => report.errors += 1,
        }
    }
    report.gaps = gaps(&seen, progress.sent.load(Ordering::Relaxed));
    report
}

/// Runs of numbers below `sent` that were not seen.
fn gaps(seen: &[bool], sent: u64) -> Vec<(u64, u64)> {
    let mut gaps: Vec<(u64, u64)> = Vec::new();
    for number in (0..sent).filter(|&number| seen.get(number as usize) != Some(&true)) {
        let adjacent = gaps.last_mut().filter(|(first, count)| *first + *count == number);
        if let Some((_, count)) = adjacent {
            *count += 1;
        } else if gaps.len() == GAPS {
            break;
        } else {
            gaps.push((number, 1));
        }
    }
    gaps
}

fn note(line: &str, report: &mut StreamReport, seen: &mut Vec<bool>, highest: &mut usize) {
    let mut words = line.split_whitespace();
    let (pod, number) = (words.next(), words.next_back().and_then(|number| number.parse::<usize>().ok()));
    let (Some(pod), Some(number)) = (pod, number) else {
        report.errors += 1;
        return;
    };
    if seen.len() <= number {
        seen.resize(number + 1, false);
    }
    if seen[number] {
        report.duplicated += 1;
        return;
    }
    seen[number] = true;
    report.answered += 1;
    report.reordered += u64::from(number < *highest);
    *highest = number.max(*highest);
    *report.pods.entry(pod.to_owned()).or_default() += 1;
}

#[cfg(test)]
mod tests {
    use super::{StreamReport, gaps, note};

    #[test]
    fn gaps_are_runs_of_missing_numbers() {
        assert_eq!(gaps(&[true, false, false, true], 6), [(1, 2), (4, 2)]);
        assert_eq!(gaps(&[true, true], 2), []);
    }

    #[test]
    fn duplicates_and_late_numbers_are_told_apart() {
        let (mut report, mut seen, mut highest) = (StreamReport { sent: 5, ..Default::default() }, Vec::new(), 0);
        for number in [0, 2, 1, 2, 4] {
            note(&format!("a1 10.0.0.1:1 63 8080 {number}\n"), &mut report, &mut seen, &mut highest);
        }
        assert_eq!((report.answered, report.duplicated, report.reordered, report.lost()), (4, 1, 1, 1));
        assert_eq!(report.pods["a1"], 4);
    }
}
