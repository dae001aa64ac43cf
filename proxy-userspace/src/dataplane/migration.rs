//! Taking over from a version whose maps have another layout, older or newer, under traffic.
//!
//! New maps are filled beside the old ones and new programs loaded over them. Programs of both versions must not open flows in different
//! tables at the same time: a request that went through one version's and a reply that goes through the other's would leave
//! untranslated. So for an instant nobody opens flows ([`newcomers::HOLD`] in both versions' `NODE`): what has changed since the first
//! copy is copied, every link gets its new program, and what old programs have still written is added. Flows that are known go on all
//! the time, a client whose first packet is dropped sends it again.
//!
//! Before links are given new programs the two directories of maps change places, which is one system call: that is the moment at which
//! the new ones count. In the second directory they say what they are made of just before. So whoever is stopped in the middle leaves a
//! second directory, which the next start finds:
//!
//! * Nothing in it says what it is made of: no link uses it. It is removed.
//! * It says so: links may use either. The next start takes the directory of its own version for the usual one, gives every link its own
//!   programs and adds what the other maps have more, or have of later, because programs open flows again after [`HELD_FOR`].

mod copy;
mod swap;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aya::Ebpf;
use proxy_common::node::newcomers;
use rustix::fs::{CWD, RenameFlags};
use tracing::{info, warn};

use self::{copy::Copies, swap::Swap};
use super::{
    error::OpenError,
    flow_table,
    layout::{self, Footing, Layout},
    load::{self, maps_directory},
    options::Options,
    raw::RawMap,
    syscall,
};

/// How long programs run at most, where the kernel does not tell when they have ended.
const PROGRAMS_END: Duration = Duration::from_millis(100);

/// How long programs open no flows unless they are told again: longer than it takes, and not as long as clients try.
const HELD_FOR: Duration = Duration::from_secs(10);

/// Directory of the maps that are made, or were left, while those of the usual one are taken over. A BPF file system takes no dots in
/// names.
pub(super) fn second_directory(pin_path: &Path) -> PathBuf {
    pin_path.join("maps-second")
}

/// Loads maps and programs, which are attached nowhere yet unless they have taken over from those of another layout.
pub(super) fn open(options: &Options) -> Result<Ebpf, OpenError> {
    let own = Layout::own()?;
    let directory = maps_directory(&options.pin_path);
    let second = second_directory(&options.pin_path);
    // Before anything is changed.
    let footing = layout::footing(&directory, &own)?;
    let left = Layout::pinned(&second).unwrap_or_else(|error| {
        warn!("{error}");
        None
    });
    match (footing, left) {
        (Footing::Other(theirs), Some(left)) if left == own => {
            let error = |source| OpenError::PinPath { path: second.clone(), source };
            exchange(&directory, &second).map_err(error)?;
            finish(options, &directory, &own, &second, &theirs)
        }
        (Footing::Other(theirs), left) => {
            if second.exists() {
                warn!("a take-over was interrupted; it begins anew");
                // Of a third version. What its programs have opened is lost, but they open no more.
                if let Some(Err(error)) = left.map(|left| set_hold(&second, &left, true)) {
                    warn!("{error}");
                }
                empty(&second)?;
            }
            Migration { options, directory, second, theirs: &theirs, own: &own }.run()
        }
        (Footing::Own, Some(left)) => finish(options, &directory, &own, &second, &left),
        (Footing::Own, None) => {
            let object = load::load(options, &directory)?;
            if Layout::pinned(&directory)?.is_none() {
                own.write(&directory)?;
            }
            if second.exists() {
                warn!("a take-over was interrupted; what there was before it goes on");
                set_hold(&directory, &own, false)?;
                remove(&second)?;
            }
            Ok(object)
        }
    }
}

/// Has the maps of the usual directory be the only ones that are used, after an interrupted take-over between them and those of the second
/// one, which are of another layout.
fn finish(
    options: &Options,
    directory: &Path,
    own: &Layout,
    second: &Path,
    theirs: &Layout,
) -> Result<Ebpf, OpenError> {
    let began = Instant::now();
    warn!("a take-over was interrupted; it is finished");
    let mut object = load::load(options, directory)?;
    let swap = Swap::prepare(options, &mut object, theirs)?;
    set_hold(directory, own, true)?;
    let held = set_hold(second, theirs, true);
    wait_for_programs();
    let links = swap.run(&mut object);
    let merged =
        held.and_then(|()| Copies::open(second, theirs, directory, own)).and_then(|mut copies| Ok(copies.merge()?));
    let entries = merged.unwrap_or_else(|error| {
        warn!("flows that were opened meanwhile are not taken over: {error}");
        0
    });
    set_hold(directory, own, false)?;
    remove(second)?;
    let (from, to) = (theirs.number, own.number);
    info!(from, to, entries, links, took = ?began.elapsed(), "finished an interrupted take-over");
    Ok(object)
}

struct Migration<'a> {
    options: &'a Options,
    directory: PathBuf,
    second: PathBuf,
    theirs: &'a Layout,
    own: &'a Layout,
}

impl Migration<'_> {
    fn run(&self) -> Result<Ebpf, OpenError> {
        let began = Instant::now();
        fs::create_dir_all(&self.second).map_err(|source| self.path_error(source))?;
        let made = self.prepare();
        let (mut object, mut copies, swap) = match made {
            Ok(made) => made,
            Err(error) => return Err(self.give_up(error)),
        };
        let held = Instant::now();
        if let Err(error) = self.catch_up(&mut copies) {
            return Err(self.give_up(error));
        }
        let links = swap.run(&mut object);
        // Little is lost without it: all that was known when nobody opened flows any more is there.
        let late = copies.add_missing().unwrap_or_else(|error| {
            warn!("flows of the last instant are not taken over: {error}");
            0
        });
        set_hold(&self.directory, self.own, false)?;
        let held = held.elapsed();
        remove(&self.second)?;
        let (from, to) = (self.theirs.number, self.own.number);
        info!(from, to, entries = copies.written(), late, links, ?held, took = ?began.elapsed(), "took over the maps of another layout");
        Ok(object)
    }

    /// All that takes long.
    fn prepare(&self) -> Result<(Ebpf, Copies, Swap), OpenError> {
        let mut object = load::load_beside(self.options, &self.directory, &self.second)?;
        let swap = Swap::prepare(self.options, &mut object, self.theirs)?;
        let mut copies = Copies::open(&self.directory, self.theirs, &self.second, self.own)?;
        copies.begin()?;
        Ok((object, copies, swap))
    }

    /// Neither the old programs nor the new ones open flows from now on.
    fn hold(&self) -> Result<(), OpenError> {
        set_hold(&self.second, self.own, true)?;
        set_hold(&self.directory, self.theirs, true)
    }

    /// Copies what programs have changed until they opened no more flows, and has the new maps count.
    fn catch_up(&self, copies: &mut Copies) -> Result<(), OpenError> {
        self.hold()?;
        wait_for_programs();
        copies.catch_up()?;
        // However long that took. What was opened after all is added last.
        self.hold()?;
        self.own.write(&self.second)?;
        exchange(&self.directory, &self.second).map_err(|source| self.path_error(source))
    }

    /// Leaves everything as it was.
    fn give_up(&self, error: OpenError) -> OpenError {
        let undone = set_hold(&self.directory, self.theirs, false).and_then(|()| remove(&self.second));
        if let Err(undone) = undone {
            warn!("{undone}");
        }
        error
    }

    fn path_error(&self, source: io::Error) -> OpenError {
        OpenError::PinPath { path: self.second.clone(), source }
    }
}

/// Every program that may have read what was written before has ended once this returns.
fn wait_for_programs() {
    if let Err(error) = syscall::bytes::wait_for_programs() {
        warn!("the kernel does not say when programs have ended ({error}): waiting {PROGRAMS_END:?}");
        std::thread::sleep(PROGRAMS_END);
    }
}

/// Has the programs over the maps in a directory open flows, or not, for [`HELD_FOR`].
fn set_hold(directory: &Path, layout: &Layout, is_held: bool) -> Result<(), OpenError> {
    let path = directory.join("NODE");
    let map = RawMap::open(&path, "NODE")?;
    let mut node = map.read(&0_u32.to_ne_bytes())?;
    let fields = layout.maps.get("NODE").map(|fields| &fields.value);
    let place = |name| fields?.get(name).map(|field| field.offset..field.offset + 4);
    let (Some(flags), Some(number)) = (place("flags"), place("layout")) else {
        return Err(OpenError::IncompatiblePin { path, difference: "it has no flags".into() });
    };
    let mut bits = [0; 4];
    bits.copy_from_slice(&node[flags.clone()]);
    let bits = u32::from_ne_bytes(bits);
    let bits = if is_held { bits | newcomers::HOLD } else { bits & !newcomers::HOLD };
    node[flags].copy_from_slice(&bits.to_ne_bytes());
    node[number].copy_from_slice(&layout.number.to_ne_bytes());
    // A version that does not know it holds them for as long as it is told.
    if let Some(until) = place("held_until") {
        let ticks = HELD_FOR.as_secs() as u32 * load::jiffies_per_second();
        node[until].copy_from_slice(&flow_table::jiffies().wrapping_add(ticks).to_ne_bytes());
    }
    Ok(map.put(&0_u32.to_ne_bytes(), &node)?)
}

/// Has two directories change places.
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    Ok(rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

/// Removes the pins in a directory. Their maps go with the last program that uses them. First what says that they are in use, so that
/// nobody takes some of them for all.
fn empty(directory: &Path) -> Result<(), OpenError> {
    let error = |source| OpenError::PinPath { path: directory.into(), source };
    let entries = fs::read_dir(directory).map_err(error)?.collect::<io::Result<Vec<_>>>().map_err(error)?;
    let mut paths: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).collect();
    paths.sort_by_key(|path| !path.ends_with("DESCRIPTION"));
    for path in paths {
        fs::remove_file(path).map_err(error)?;
    }
    Ok(())
}

fn remove(directory: &Path) -> Result<(), OpenError> {
    empty(directory)?;
    fs::remove_dir(directory).map_err(|source| OpenError::PinPath { path: directory.into(), source })
}
