//! Where traffic begins and ends: a network namespace, a cgroup, and the resident process in both.

use std::{
    env,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};

use super::{
    Answer, Ask, ChurnPlan, ChurnReport, Command, Failure, Findings, Inquiry, RatePlan, RateReport, Reply, StreamPlan,
    StreamReport, Target, TransferReport,
    bare::{Call, Heard, Kind},
};
use crate::{lab::cgroup, netns::Namespace};

/// A place of the lab. Traffic errors come as [`Failure`], behind `anyhow`.
#[derive(Debug)]
pub struct Place {
    namespace: Namespace,
    cgroup: PathBuf,
    resident: Mutex<Pipes>,
}

#[derive(Debug)]
struct Pipes {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

/// Something that goes on in a place until it is finished.
#[derive(Debug)]
pub struct Activity<'place> {
    place: &'place Place,
    number: u64,
}

/// The program that residents are: the `lab` binary, which `SLUICE_LAB` names or which lies beside or above the running
/// one, as cargo puts it.
pub fn resident_program() -> Result<PathBuf> {
    if let Some(path) = env::var_os("SLUICE_LAB") {
        return Ok(path.into());
    }
    let own = env::current_exe().context("cannot tell which program this is")?;
    let beside = own.ancestors().skip(1).take(2).map(|directory| directory.join("lab"));
    beside
        .into_iter()
        .find(|path| path.is_file())
        .context("the lab binary is not built: cargo build -p tests --bin lab")
}

impl Place {
    /// Starts a resident.
    pub fn new(namespace: Namespace, cgroup: PathBuf) -> Result<Self> {
        let mut command = namespace.command(resident_program()?)?;
        cgroup::enter_on_exec(&mut command, &cgroup)?;
        // In a process group of its own, so that an interrupt from the terminal is the lab's affair alone.
        command.process_group(0);
        let mut child = command.arg("resident").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("the resident has no stdout")?);
        Ok(Self { namespace, cgroup, resident: Mutex::new(Pipes { child, stdin, stdout }) })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        self.namespace.name()
    }

    /// Its network namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its cgroup's directory.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// A command that will run here.
    pub fn command(&self, program: impl AsRef<Path>) -> Result<std::process::Command> {
        let mut command = self.namespace.command(program)?;
        cgroup::enter_on_exec(&mut command, &self.cgroup)?;
        Ok(command)
    }

    /// Listens on TCP and UDP, both families, for as long as the place lives.
    pub fn serve(&self, ports: &[u16]) -> Result<()> {
        let command = Command::Serve { name: self.name().to_owned(), ports: ports.to_vec() };
        match self.call(&command)? {
            Reply::Done => Ok(()),
            reply => self.unexpected(reply),
        }
    }

    /// The time that the resident has had of processors so far.
    pub fn spent(&self) -> Result<Duration> {
        let id = self.resident.lock().unwrap_or_else(PoisonError::into_inner).child.id();
        let clock = clock_getcpuclockid(Pid::from_raw(id.cast_signed()))?;
        Ok(clock_gettime(clock)?.into())
    }

    /// Takes TCP connections to a port over IPv4, and closes them at once, for as long as the place lives.
    pub fn accept(&self, port: u16) -> Result<()> {
        match self.call(&Command::Accept(port))? {
            Reply::Done => Ok(()),
            reply => self.unexpected(reply),
        }
    }

    /// As many TCP connections as there is time for.
    pub fn churn(&self, plan: ChurnPlan) -> Result<ChurnReport> {
        match self.call(&Command::Churn(plan))? {
            Reply::Churned(report) => Ok(report),
            reply => self.unexpected(reply),
        }
    }

    /// Whether a socket can be bound to the address.
    pub fn bind(&self, target: Target) -> Result<Result<(), Failure>> {
        match self.call(&Command::Bind(target))? {
            Reply::Done => Ok(Ok(())),
            Reply::Failed(failure) => Ok(Err(failure)),
            reply => self.unexpected(reply),
        }
    }

    /// One request.
    pub fn ask(&self, ask: Ask) -> Result<Answer> {
        let answer = self.ask_times(ask, 1)?.pop().context("no answer to one request")?;
        answer.with_context(|| format!("{} asked {}", self.name(), ask.target))
    }

    /// So many requests, one after the other, each on a socket of its own.
    pub fn ask_times(&self, ask: Ask, count: u32) -> Result<Vec<Result<Answer, Failure>>> {
        match self.call(&Command::Ask(ask, count))? {
            Reply::Answers(answers) => Ok(answers),
            reply => self.unexpected(reply),
        }
    }

    /// Many questions at once; what was found about each, in their order.
    pub fn inquire(&self, inquiries: Vec<Inquiry>) -> Result<Vec<Findings>> {
        match self.call(&Command::Inquire(inquiries))? {
            Reply::Found(findings) => Ok(findings),
            reply => self.unexpected(reply),
        }
    }

    /// A TCP connection, or a UDP socket, that stays open.
    pub fn open(&self, ask: Ask) -> Result<Activity<'_>> {
        self.start(&Command::Open(ask))
    }

    /// A socket that does what it is told.
    pub fn make(&self, kind: Kind) -> Result<Activity<'_>> {
        self.start(&Command::Make(kind))
    }

    /// A stream of numbered UDP datagrams.
    pub fn stream(&self, plan: StreamPlan) -> Result<Activity<'_>> {
        self.start(&Command::Stream(plan))
    }

    /// TCP connections at a steady rate.
    pub fn rate(&self, plan: RatePlan) -> Result<Activity<'_>> {
        self.start(&Command::Rate(plan))
    }

    /// So many bytes to a server and back.
    pub fn transfer(&self, ask: Ask, bytes: u64) -> Result<TransferReport> {
        match self.call(&Command::Transfer(ask, bytes))? {
            Reply::Transferred(report) => Ok(report),
            reply => self.unexpected(reply),
        }
    }

    fn start(&self, command: &Command) -> Result<Activity<'_>> {
        match self.call(command)? {
            Reply::Started(number) => Ok(Activity { place: self, number }),
            reply => self.unexpected(reply),
        }
    }

    fn call(&self, command: &Command) -> Result<Reply> {
        let mut pipes = self.resident.lock().unwrap_or_else(PoisonError::into_inner);
        pipes.exchange(command).with_context(|| format!("the resident of {} does not answer", self.name()))
    }

    fn unexpected<T>(&self, reply: Reply) -> Result<T> {
        match reply {
            Reply::Failed(failure) => Err(failure).with_context(|| format!("traffic from {}", self.name())),
            Reply::Refused(reason) => bail!("{}: {reason}", self.name()),
            reply => bail!("{} gave an answer to another question: {reply:?}", self.name()),
        }
    }
}

impl Pipes {
    fn exchange(&mut self, command: &Command) -> Result<Reply> {
        let stdin = self.stdin.as_mut().context("its stdin is closed")?;
        stdin.write_all(format!("{}\n", serde_json::to_string(command)?).as_bytes())?;
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Pipes {
    fn drop(&mut self) {
        // A resident ends with its stdin, but may be in the middle of a long command.
        self.stdin = None;
        let ended = self.child.kill().and_then(|()| self.child.wait());
        if let Err(error) = ended {
            eprintln!("a resident process stays behind: {error}");
        }
    }
}

impl Activity<'_> {
    /// One more request on an open connection or socket.
    pub fn ask(&self) -> Result<Answer> {
        self.try_ask()?.with_context(|| format!("{} asked on an open connection", self.place.name()))
    }

    /// One more request, which may fail.
    pub fn try_ask(&self) -> Result<Result<Answer, Failure>> {
        match self.place.call(&Command::Again(self.number))? {
            Reply::Answers(mut answers) => answers.pop().context("no answer to one request"),
            reply => self.place.unexpected(reply),
        }
    }

    /// One call on a socket that does what it is told; the error is its number.
    pub fn call(&self, call: Call) -> Result<Result<Heard, i32>> {
        match self.place.call(&Command::Call(self.number, call))? {
            Reply::Heard(heard) => Ok(heard),
            reply => self.place.unexpected(reply),
        }
    }

    /// Closes a connection or socket.
    pub fn close(self) -> Result<()> {
        match self.place.call(&Command::Close(self.number))? {
            Reply::Done => Ok(()),
            reply => self.place.unexpected(reply),
        }
    }

    /// Ends a stream.
    pub fn finish_stream(self) -> Result<StreamReport> {
        match self.place.call(&Command::Finish(self.number))? {
            Reply::Streamed(report) => Ok(report),
            reply => self.place.unexpected(reply),
        }
    }

    /// Ends connections at a rate.
    pub fn finish_rate(self) -> Result<RateReport> {
        match self.place.call(&Command::Finish(self.number))? {
            Reply::Rated(report) => Ok(report),
            reply => self.place.unexpected(reply),
        }
    }
}
