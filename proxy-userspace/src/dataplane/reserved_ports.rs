//! The source ports of masqueraded flows are kept from the node's own sockets: they are entered among the ports that the
//! kernel gives nobody of its own accord (`net.ipv4.ip_local_reserved_ports`), beside what others have entered there.
//!
//! Which of those are ours has to be known to whoever takes them out again, and to nobody after a reboot: it is noted where
//! the pins are, as the target of a symbolic link that leads nowhere.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    ops::RangeInclusive,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use tracing::{info, warn};

use super::error::Error;

/// Both are those of the network namespace of who reads them.
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
const EPHEMERAL: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// The note's name in the pin directory.
const NOTE: &str = "reserved-ports";

/// Ports, as the kernel writes them: `8080,10000-29999`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ports(BTreeSet<u16>);

impl Ports {
    fn parse(text: &str) -> Option<Self> {
        let items = text.trim().split(',').map(str::trim).filter(|item| !item.is_empty());
        let mut ports = BTreeSet::new();
        for item in items {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            ports.extend(first.parse::<u16>().ok()?..=last.parse().ok()?);
        }
        Some(Self(ports))
    }

    fn with(&self, range: &RangeInclusive<u16>) -> Self {
        Self(self.0.iter().copied().chain(range.clone()).collect())
    }

    fn without(&self, other: &Self) -> Self {
        Self(self.0.difference(&other.0).copied().collect())
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ports = self.0.iter().copied().peekable();
        let mut separator = "";
        while let Some(first) = ports.next() {
            let mut last = first;
            while let Some(next) = ports.next_if(|port| Some(*port) == last.checked_add(1)) {
                last = next;
            }
            write!(f, "{separator}{first}")?;
            if last != first {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

/// What stands in the kernel, and what of it we have entered.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reserved {
    all: Ports,
    ours: Ports,
}

impl Reserved {
    /// With our ports entered; those we had entered before and do not want any more are taken out.
    fn holding(&self, range: &RangeInclusive<u16>) -> Self {
        let others = self.all.without(&self.ours);
        Self { ours: Ports::default().with(range).without(&others), all: others.with(range) }
    }
}

/// Why the ports are not kept from others.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error(
        "the source ports {range} of masqueraded flows cannot be kept from the node's own sockets ({reason}): run \
         `sysctl -w net.ipv4.ip_local_reserved_ports={wanted}` on the node"
    )]
    NotWritable { range: String, wanted: String, reason: String },
    #[error(
        "the source ports {range} of masqueraded flows are most of the ports that the node's own sockets get ({ephemeral}), and \
         are not kept from them: set --source-port-range or net.ipv4.ip_local_port_range so that they lie apart"
    )]
    Scarce { range: String, ephemeral: String },
    #[error("cannot see which ports are reserved ({path}): {reason}")]
    NotReadable { path: &'static str, reason: String },
}

/// Sees to it that the ports stay reserved while an agent runs, and complains once of what is in the way.
#[derive(Debug, Default)]
pub(super) struct Reservation {
    complaint: Option<Refusal>,
    /// What was noted last: the note goes with the pins if these are wiped.
    ours: Ports,
}

impl Reservation {
    /// Looks, and enters what is missing.
    pub(super) fn hold(&mut self, pin_path: &Path, range: &RangeInclusive<u16>) {
        if self.ours != Ports::default() && noted(pin_path) == Ports::default() {
            // What cannot be written now is tried again the next time.
            let _ = note(pin_path, &self.ours);
        }
        let complaint = hold(pin_path, range).err();
        let ours = noted(pin_path);
        if ours != Ports::default() {
            self.ours = ours;
        }
        if let Some(refusal) = complaint.as_ref().filter(|_| complaint != self.complaint) {
            warn!("{refusal}");
        }
        self.complaint = complaint;
    }
}

fn hold(pin_path: &Path, range: &RangeInclusive<u16>) -> Result<(), Refusal> {
    let found = Reserved { all: read(RESERVED)?, ours: noted(pin_path) };
    let wanted = found.holding(range);
    if wanted == found {
        return Ok(());
    }
    let range = format!("{}-{}", range.start(), range.end());
    let ephemeral = ephemeral()?;
    if is_scarce(&ephemeral, &wanted.all) {
        let ephemeral = format!("{}-{}", ephemeral.start(), ephemeral.end());
        return Err(Refusal::Scarce { range, ephemeral });
    }
    // Noted first: what is noted and not there does no harm, the reverse stays for ever.
    let written = note(pin_path, &wanted.ours).and_then(|()| fs::write(RESERVED, wanted.all.to_string()));
    written.map_err(|error| {
        let _ = note(pin_path, &found.ours);
        Refusal::NotWritable { range: range.clone(), wanted: wanted.all.to_string(), reason: error.to_string() }
    })?;
    info!("the source ports {range} of masqueraded flows are kept from the node's own sockets");
    Ok(())
}

/// What we have entered.
pub(super) fn held(pin_path: &Path) -> Option<String> {
    place(pin_path).is_symlink().then(|| noted(pin_path).to_string())
}

/// Takes out what we have entered. Somebody else may have done it, where we may not.
pub(super) fn release(pin_path: &Path) -> Result<(), Error> {
    let ours = noted(pin_path);
    if ours != Ports::default()
        && let Ok(all) = read(RESERVED)
    {
        let others = all.without(&ours);
        if others != all {
            // A line is what the kernel takes, an empty one too.
            let written = fs::write(RESERVED, format!("{others}\n"));
            written.map_err(|source| Error::ReservedPorts { others: others.to_string(), source })?;
        }
    }
    match fs::remove_file(place(pin_path)) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::Kernel { what: "the note of the reserved ports to be removed", source })
        }
        _ => Ok(()),
    }
}

/// Whether reserved ports leave the node's own sockets less than half of those that they are to have.
fn is_scarce(ephemeral: &RangeInclusive<u16>, reserved: &Ports) -> bool {
    let taken = reserved.0.range(ephemeral.clone()).count();
    taken * 2 > ephemeral.len()
}

fn read(path: &'static str) -> Result<Ports, Refusal> {
    let text = fs::read_to_string(path).map_err(|error| Refusal::NotReadable { path, reason: error.to_string() })?;
    Ports::parse(&text).ok_or_else(|| Refusal::NotReadable { path, reason: format!("{text:?}") })
}

fn ephemeral() -> Result<RangeInclusive<u16>, Refusal> {
    let path = EPHEMERAL;
    let text = fs::read_to_string(path).map_err(|error| Refusal::NotReadable { path, reason: error.to_string() })?;
    let mut numbers = text.split_whitespace().map_while(|number| number.parse().ok());
    let range = numbers.next().zip(numbers.next()).map(|(first, last)| first..=last);
    range.ok_or_else(|| Refusal::NotReadable { path, reason: format!("{text:?}") })
}

/// Where it is noted.
pub(super) fn place(pin_path: &Path) -> PathBuf {
    pin_path.join(NOTE)
}

fn noted(pin_path: &Path) -> Ports {
    let note = fs::read_link(place(pin_path)).unwrap_or_default();
    Ports::parse(&note.to_string_lossy()).unwrap_or_default()
}

fn note(pin_path: &Path, ours: &Ports) -> io::Result<()> {
    let place = place(pin_path);
    match fs::remove_file(&place) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if *ours == Ports::default() { Ok(()) } else { symlink(ours.to_string(), place) }
}

#[cfg(test)]
mod tests {
    use super::{Ports, Reserved, is_scarce};

    fn ports(text: &str) -> Ports {
        Ports::parse(text).unwrap()
    }

    #[test]
    fn ports_are_written_as_the_kernel_writes_them() {
        for text in ["", "8080", "8080,10000-29999", "1-3,5,7-8,65534-65535"] {
            assert_eq!(ports(&format!("{text}\n")).to_string(), text);
        }
        assert_eq!(ports("5,1-3,2-4").to_string(), "1-5");
        for nonsense in ["a", "1-", "1-2-3", "65536"] {
            assert_eq!(Ports::parse(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn what_others_have_entered_stays_theirs() {
        let cases = [
            ("nothing there", "", "", ("10000-29999", "10000-29999")),
            ("others apart", "8080", "", ("8080,10000-29999", "10000-29999")),
            ("others inside", "15000-15010", "", ("10000-29999", "10000-14999,15011-29999")),
            ("ours already", "8080,10000-29999", "10000-29999", ("8080,10000-29999", "10000-29999")),
            ("another range of ours", "8080,4000-5000", "4000-5000", ("8080,10000-29999", "10000-29999")),
            ("ours taken out by others", "8080", "10000-29999", ("8080,10000-29999", "10000-29999")),
        ];
        for (name, all, ours, (all_after, ours_after)) in cases {
            let after = Reserved { all: ports(all), ours: ports(ours) }.holding(&(10_000..=29_999));
            assert_eq!(
                (after.all.to_string(), after.ours.to_string()),
                (all_after.into(), ours_after.into()),
                "{name}"
            );
        }
    }

    #[test]
    fn the_nodes_own_sockets_keep_half_of_their_ports() {
        assert!(!is_scarce(&(32_768..=60_999), &ports("10000-29999")));
        assert!(!is_scarce(&(1_024..=65_535), &ports("10000-29999")));
        assert!(is_scarce(&(10_000..=40_000), &ports("10000-29999")));
    }
}
