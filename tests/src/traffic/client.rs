//! Clients: one request, a connection or a UDP socket that stays, a large transfer.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    thread,
    time::Instant,
};

use super::{
    Answer, Ask, Failure, Protocol, TransferReport,
    server::{Datagram, receive, transfer_request},
    socket::{accept_no_checksum, any_like, connect, datagram, retransmits, skip_checksum},
};

pub(super) const WHO: &str = "who";

/// One request on a socket of its own.
pub fn ask(ask: &Ask) -> Result<Answer, Failure> {
    match ask.target.protocol {
        Protocol::Tcp => Connection::open(ask)?.ask(),
        Protocol::Udp => ask_by_datagram(ask),
    }
}

fn ask_by_datagram(ask: &Ask) -> Result<Answer, Failure> {
    Conversation::open(ask)?.ask()
}

/// A UDP socket that stays open, connected or not.
#[derive(Debug)]
pub struct Conversation {
    socket: UdpSocket,
    request: Ask,
}

impl Conversation {
    /// Makes the socket, and connects it if it is to be.
    pub fn open(ask: &Ask) -> Result<Self, Failure> {
        let socket = datagram(ask.source.unwrap_or_else(|| SocketAddr::new(any_like(ask.target.address.ip()), 0)))?;
        socket.set_read_timeout(Some(ask.timeout))?;
        if ask.without_checksum {
            skip_checksum(&socket, true)?;
            accept_no_checksum(&socket)?;
        }
        if !ask.unconnected {
            socket.connect(ask.target.address)?;
        }
        Ok(Self { socket, request: *ask })
    }

    /// One request.
    pub fn ask(&mut self) -> Result<Answer, Failure> {
        let start = Instant::now();
        if self.request.unconnected {
            self.socket.send_to(WHO.as_bytes(), self.request.target.address)?;
        } else {
            self.socket.send(WHO.as_bytes())?;
        }
        let mut buffer = [0; 2048];
        let Datagram { length, from, .. } = receive(&self.socket, &mut buffer)?;
        let line = String::from_utf8_lossy(&buffer[..length]);
        parse(&line, self.socket.local_addr()?, from.unwrap_or(self.request.target.address), start)
    }
}

/// What the line of a server says. The last word must be what was asked.
fn parse(line: &str, local: SocketAddr, from: SocketAddr, start: Instant) -> Result<Answer, Failure> {
    let words: Vec<_> = line.trim_end().splitn(5, ' ').collect();
    let [pod, peer, ttl, port, WHO] = words[..] else { return Err(Failure::Garbled) };
    let answer = Answer {
        pod: pod.to_owned(),
        peer: peer.parse().ok().ok_or(Failure::Garbled)?,
        ttl: ttl.parse().ok(),
        server_port: port.parse().ok().ok_or(Failure::Garbled)?,
        local,
        from,
        latency: start.elapsed(),
    };
    Ok(answer)
}

/// A TCP connection that stays open.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<TcpStream>,
    opened: Instant,
    used: bool,
}

impl Connection {
    /// Connects.
    pub fn open(ask: &Ask) -> Result<Self, Failure> {
        let opened = Instant::now();
        let stream = connect(ask)?;
        Ok(Self { reader: BufReader::new(stream), opened, used: false })
    }

    /// One request. The latency of the first includes `connect`.
    pub fn ask(&mut self) -> Result<Answer, Failure> {
        let start = if self.used { Instant::now() } else { self.opened };
        self.used = true;
        let line = self.exchange(&format!("{WHO}\n"))?;
        let stream = self.reader.get_ref();
        parse(&line, stream.local_addr()?, stream.peer_addr()?, start)
    }

    /// How many segments were sent again so far.
    pub fn retransmits(&self) -> u64 {
        retransmits(self.reader.get_ref()).unwrap_or_default()
    }

    fn exchange(&mut self, line: &str) -> Result<String, Failure> {
        self.reader.get_mut().write_all(line.as_bytes())?;
        let mut answer = String::new();
        if self.reader.read_line(&mut answer)? == 0 || !answer.ends_with('\n') {
            return Err(Failure::ClosedEarly);
        }
        Ok(answer)
    }
}

/// So many bytes to a server and back, both ways at once.
pub fn transfer(ask: &Ask, bytes: u64) -> Result<TransferReport, Failure> {
    let mut connection = Connection::open(ask)?;
    let line = connection.exchange(&transfer_request(bytes))?;
    let stream = connection.reader.get_ref().try_clone()?;
    thread::scope(|scope| {
        let writer = scope.spawn(move || write_pattern(stream, bytes));
        let compared = compare_pattern(&mut connection.reader, bytes);
        writer.join().map_or(Err(Failure::Garbled), |written| Ok(written?))?;
        compared
    })?;
    Ok(TransferReport {
        pod: line.split(' ').next().unwrap_or_default().to_owned(),
        bytes,
        elapsed: connection.opened.elapsed(),
        retransmits: connection.retransmits(),
    })
}

/// Bytes that repeat only after a long time, so that a misplaced segment shows (xorshift, Marsaglia 2003).
struct Pattern(u64);

impl Pattern {
    const fn new() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }

    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_ne_bytes()[..chunk.len()]);
        }
    }
}

const CHUNK: usize = 64 << 10;

fn write_pattern(mut stream: TcpStream, bytes: u64) -> io::Result<()> {
    let (mut pattern, mut buffer) = (Pattern::new(), vec![0; CHUNK]);
    for length in chunk_lengths(bytes) {
        pattern.fill(&mut buffer[..length]);
        stream.write_all(&buffer[..length])?;
    }
    Ok(())
}

fn compare_pattern(reader: &mut impl io::Read, bytes: u64) -> Result<(), Failure> {
    let (mut pattern, mut want, mut have) = (Pattern::new(), vec![0; CHUNK], vec![0; CHUNK]);
    for length in chunk_lengths(bytes) {
        pattern.fill(&mut want[..length]);
        reader.read_exact(&mut have[..length])?;
        if want[..length] != have[..length] {
            return Err(Failure::Garbled);
        }
    }
    Ok(())
}

fn chunk_lengths(bytes: u64) -> impl Iterator<Item = usize> {
    (0..bytes).step_by(CHUNK).map(move |at| (bytes - at).min(CHUNK as u64) as usize)
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, Pattern, chunk_lengths, compare_pattern};
    use crate::traffic::Failure;

    #[test]
    fn chunks_add_up() {
        assert_eq!(chunk_lengths(2 * CHUNK as u64 + 5).collect::<Vec<_>>(), [CHUNK, CHUNK, 5]);
        assert_eq!(chunk_lengths(0).count(), 0);
    }

    #[test]
    fn one_wrong_byte_is_noticed() {
        let mut bytes = vec![0; CHUNK + 3];
        Pattern::new().fill(&mut bytes[..CHUNK]);
        let mut rest = Pattern::new();
        rest.fill(&mut vec![0; CHUNK]);
        rest.fill(&mut bytes[CHUNK..]);
        assert_eq!(compare_pattern(&mut &bytes[..], bytes.len() as u64), Ok(()));
        bytes[CHUNK + 1] ^= 1;
        assert_eq!(compare_pattern(&mut &bytes[..], bytes.len() as u64), Err(Failure::Garbled));
    }
}
