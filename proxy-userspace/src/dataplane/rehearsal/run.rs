//! Runs a program once over a packet, by `BPF_PROG_TEST_RUN`. In: the packet as it comes in by a device of the calling
//! thread's network namespace. Out: what the program said, and the packet as it left it. The packet goes nowhere: the kernel
//! carries no verdict of such a run out.

use aya::{
    TestRun as _, TestRunOptions,
    programs::{Program, ProgramError},
};

/// What a program said of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It goes on through the kernel.
    Passed,
    /// It ends here.
    Dropped,
    /// It leaves by a device at once.
    Sent,
}

/// What a program said, and left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ran {
    pub(super) action: Action,
    pub(super) bytes: Vec<u8>,
}

/// What a packet may grow by: an answer quotes it behind headers of its own.
const GROWTH: usize = 256;

/// `XDP_DROP` and `XDP_PASS`, of `enum xdp_action`; the others send, or are not used.
const XDP: (u32, u32) = (1, 2);
/// `TC_ACT_SHOT` and `TC_ACT_UNSPEC` (`include/uapi/linux/pkt_cls.h`).
const TC: (u32, u32) = (2, u32::MAX);

/// Runs a program that is loaded.
pub(super) fn run(program: &Program, packet: &[u8], ifindex: u32) -> Result<Ran, ProgramError> {
    let mut bytes = vec![0; packet.len() + GROWTH];
    let ((dropped, passed), result) = match program {
        Program::Xdp(program) => {
            // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
            let mut context = [0_u8; 24];
            context[4..8].copy_from_slice(&(packet.len() as u32).to_ne_bytes());
            context[12..16].copy_from_slice(&ifindex.to_ne_bytes());
            (XDP, program.test_run(options(packet, &mut bytes, &context))?)
        }
        Program::SchedClassifier(program) => {
            // struct __sk_buff, of which the kernel takes ifindex from offset 40.
            let mut context = [0_u8; 192];
            context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
            (TC, program.test_run(options(packet, &mut bytes, &context))?)
        }
        _ => return Err(ProgramError::UnexpectedProgramType),
    };
    bytes.truncate(result.data_size_out as usize);
    let action = match result.return_value {
        code if code == dropped => Action::Dropped,
        code if code == passed => Action::Passed,
        _ => Action::Sent,
    };
    Ok(Ran { action, bytes })
}

fn options<'a>(packet: &'a [u8], bytes: &'a mut [u8], context: &'a [u8]) -> TestRunOptions<'a> {
    TestRunOptions { data_in: Some(packet), data_out: Some(bytes), ctx_in: Some(context), ..TestRunOptions::new() }
}
