//! Runs of a program over a packet that is restored before each of them, and what they cost; and frames that are restored and
//! really go where the program sends them.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    TestRun as _, TestRunAttrs, TestRunOptions,
    maps::{Array, PerCpuArray, ProgramArray},
    programs::{Program, ProgramFd, XdpMode},
};
use bench_ebpf::contract::{Ends, NOT_CALLED, Plan, RESTORED};
use nix::time::{ClockId, clock_gettime};

use super::{
    softirq,
    yardstick::{Place, Role, Yardstick},
};
use crate::{frame::Frame, netns::Namespace, testbed::Ran};

/// Packets of one kind.
#[derive(Clone, Debug)]
pub struct Traffic {
    /// Any of them.
    pub bytes: Vec<u8>,
    /// Where its flows begin and end in the list.
    pub flows: std::ops::Range<u32>,
    /// Every packet is of another flow, which has some of the bits of a number in its source.
    pub is_new: bool,
    /// Family.
    pub is_v6: bool,
}

/// What many runs were.
#[derive(Clone, Debug)]
pub struct Runs {
    /// Of the processor's time, for each.
    pub nanoseconds: f64,
    /// What the program said to the last packet and made of it.
    pub last: Ran,
}

impl Yardstick {
    /// Packets like this one, of these flows, which stay on the list.
    pub fn traffic(&mut self, like: &Frame, ends: &[Ends]) -> Result<Traffic> {
        let traffic = self.scratch(like, ends)?;
        self.ends = traffic.flows.end;
        Ok(traffic)
    }

    /// The same of flows whose place on the list is the next one's, too.
    pub fn scratch(&mut self, like: &Frame, ends: &[Ends]) -> Result<Traffic> {
        let flows = self.ends..self.ends + u32::try_from(ends.len())?;
        let mut clients = Array::<_, Ends>::try_from(self.map("CLIENTS")?)?;
        ensure!(flows.end <= clients.len(), "the list of flows is full");
        for (index, ends) in flows.clone().zip(ends) {
            clients.set(index, ends, 0)?;
        }
        Ok(Traffic { bytes: like.bytes(), flows, is_new: false, is_v6: like.source.0.is_ipv6() })
    }

    /// A program of the bench, for others to call.
    pub fn descriptor(&mut self, role: Role, place: Place) -> Result<ProgramFd> {
        let descriptor = match self.program(role, place)? {
            Program::Xdp(program) => program.fd()?,
            Program::SchedClassifier(program) => program.fd()?,
            _ => bail!("{role:?} is of another kind"),
        };
        Ok(descriptor.try_clone()?)
    }

    /// From now on this program is called.
    pub fn call(&mut self, place: Place, program: &ProgramFd) -> Result<()> {
        let map = match place {
            Place::Xdp => "XDP_TARGET",
            Place::Tc => "TC_TARGET",
        };
        Ok(ProgramArray::try_from(self.map(map)?)?.set(0, program, 0)?)
    }

    /// Lets the program that is called have so many packets, which came in by a device of the caller's namespace.
    pub fn repeat(&mut self, place: Place, traffic: &Traffic, ifindex: u32, count: u32) -> Result<Runs> {
        self.plan(traffic)?;
        let program = self.program(Role::Restore, place)?;
        let mut out = vec![0; traffic.bytes.len() + 256];
        let context = context(place, ifindex, traffic.bytes.len());
        let options = TestRunOptions {
            data_in: Some(&traffic.bytes),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            repeat: count,
            ..TestRunOptions::new()
        };
        let began = spent()?;
        let result = match program {
            Program::Xdp(program) => program.test_run(options)?,
            Program::SchedClassifier(program) => program.test_run(options)?,
            _ => bail!("what restores packets is of another kind"),
        };
        let taken = spent()?.checked_sub(began).context("the clock goes backwards")?;
        ensure!(result.return_value != NOT_CALLED, "the program was not called, or the packet is too short");
        out.truncate(result.data_size_out as usize);
        let last = Ran { action: result.return_value.cast_signed(), bytes: out };
        Ok(Runs { nanoseconds: taken.as_secs_f64() * 1e9 / f64::from(count), last })
    }

    /// Sends so many frames, as if they had come in by a device of the caller's namespace, through the XDP program that is called; what
    /// it answers comes true. Returns what that took of the processor, which the caller must not leave: what is received at the other end
    /// is received there, too.
    pub fn inject(&mut self, traffic: &Traffic, ifindex: u32, count: u32) -> Result<Duration> {
        self.plan(traffic)?;
        let context = context(Place::Xdp, ifindex, traffic.bytes.len());
        let options = TestRunOptions {
            data_in: Some(&traffic.bytes),
            ctx_in: Some(&context),
            repeat: count,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::new()
        };
        let Program::Xdp(program) = self.program(Role::Restore, Place::Xdp)? else {
            bail!("what restores packets is of another kind")
        };
        let began = spent()? + softirq::spent()?;
        program.test_run(options)?;
        (spent()? + softirq::spent()?).checked_sub(began).context("the clock goes backwards")
    }

    /// Counts and drops what arrives at a device, which may be sent frames from now on that no skb was made for.
    pub fn sink(&mut self, namespace: &Namespace, device: &str) -> Result<()> {
        let ifindex = namespace.device_index(device)?;
        let Program::Xdp(program) = self.program(Role::Sink, Place::Xdp)? else { bail!("the sink is of another kind") };
        let attached = namespace.run(|| program.attach_to_if_index(ifindex, XdpMode::Driver))?;
        attached.with_context(|| format!("cannot attach the sink to {device} in {}", namespace.name()))?;
        Ok(())
    }

    /// How many frames have arrived.
    pub fn arrived(&mut self) -> Result<u64> {
        Ok(PerCpuArray::<_, u64>::try_from(self.map("ARRIVED")?)?.get(&0, 0)?.iter().sum())
    }

    fn plan(&mut self, traffic: &Traffic) -> Result<()> {
        let mut plans = Array::<_, Plan>::try_from(self.map("PLAN")?)?;
        let (first, next) = (traffic.flows.start, traffic.flows.start);
        let end = if traffic.is_new { first } else { traffic.flows.end };
        let mut bytes = [0; RESTORED];
        bytes.copy_from_slice(traffic.bytes.get(..RESTORED).context("too short a packet")?);
        // It goes on, so that no flow is new twice.
        let fresh = plans.get(&0, 0)?.fresh;
        Ok(plans.set(0, Plan { bytes, first, end, next, fresh, is_v6: traffic.is_v6.into(), pad: 0 }, 0)?)
    }
}

/// As many frames as a driver takes at once; a veth's queue has room for four times that.
const BATCH: u32 = 64;

/// `struct xdp_md` or `struct __sk_buff`, as far as the kernel takes it.
fn context(place: Place, ifindex: u32, length: usize) -> Vec<u8> {
    match place {
        Place::Xdp => {
            let mut context = vec![0; 24];
            context[4..8].copy_from_slice(&(length as u32).to_ne_bytes());
            context[12..16].copy_from_slice(&ifindex.to_ne_bytes());
            context
        }
        Place::Tc => {
            let mut context = vec![0; 192];
            context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
            context
        }
    }
}

/// The time that the calling thread has had of a processor, which does not go on while others have it.
fn spent() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
