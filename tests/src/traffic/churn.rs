//! TCP connections that are made and closed as fast as one thread can. They end with a reset, so that no port waits for stray
//! segments and the next connection may have it.

use std::{
    io,
    net::{Ipv4Addr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use socket2::SockRef;

use super::{ChurnPlan, ChurnReport, socket::listen};

/// Takes connections to a port and closes them, on a thread that ends with the process.
pub fn accept(port: u16) -> io::Result<()> {
    let listener = listen(Ipv4Addr::UNSPECIFIED.into(), port)?;
    // One that was reset before it was taken is an error, and not the last one.
    thread::spawn(move || listener.incoming().for_each(drop));
    Ok(())
}

/// Makes connections until the time is over.
pub fn churn(plan: ChurnPlan) -> io::Result<ChurnReport> {
    let mut latencies = Vec::new();
    let began = Instant::now();
    while began.elapsed() < plan.during {
        let this = Instant::now();
        let stream = TcpStream::connect(plan.target)?;
        latencies.push(this.elapsed().as_nanos().try_into().unwrap_or(u32::MAX));
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    Ok(ChurnReport { latencies, elapsed: began.elapsed() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_made_until_the_time_is_over() {
        let listener = listen(Ipv4Addr::LOCALHOST.into(), 0).unwrap();
        let target = listener.local_addr().unwrap();
        thread::spawn(move || listener.incoming().for_each(drop));
        let during = Duration::from_millis(50);
        let report = churn(ChurnPlan { target, during }).unwrap();
        assert!(report.elapsed >= during, "{:?}", report.elapsed);
        assert!(report.latencies.len() > 1 && report.latencies.iter().all(|latency| *latency > 0));
    }

    #[test]
    fn a_connection_that_is_refused_is_an_error() {
        let listener = listen(Ipv4Addr::LOCALHOST.into(), 0).unwrap();
        let target = listener.local_addr().unwrap();
        drop(listener);
        assert!(churn(ChurnPlan { target, during: Duration::from_secs(1) }).is_err());
    }
}
