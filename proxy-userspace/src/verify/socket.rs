//! Where an agent says whether the kernel holds what it wants: a socket in its `--state-dir`. In: a connection of the agent's own user;
//! connecting is asking. Out: an [`Answer`] as JSON, and the end. The agent's loop is asked for a copy of its tables and goes on; the
//! maps are read and compared beside it, for one who asks after the other.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::{
        mpsc::{self, Receiver, Sender},
        oneshot,
    },
    task,
    time::{sleep, timeout},
};

use super::{Comparison, of_tables};
use crate::desired::Tables;

/// Its name in the state directory.
pub(crate) const FILE: &str = "verify.sock";

/// Until an answer must have been taken: then the next one who asks gets his.
const TAKEN: Duration = Duration::from_secs(30);

/// After a connection could not be accepted: out of descriptors, most likely.
const RETRY: Duration = Duration::from_secs(1);

/// What asks the agent's loop for the tables as of its last plan; it says none while it has not heard everything.
pub(crate) type Question = oneshot::Sender<Option<Tables>>;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Compared(Comparison),
    NotInSync,
    Failed(String),
}

/// Answers for as long as there is a runtime. To be called by the agent, whose loop gets the questions.
pub(crate) fn serve(state_dir: &Path, pin_path: PathBuf) -> io::Result<Receiver<Question>> {
    let path = state_dir.join(FILE);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        // An agent before has left it.
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    let (sender, questions) = mpsc::channel(1);
    tokio::spawn(answer_all(listener, sender, pin_path));
    Ok(questions)
}

async fn answer_all(listener: UnixListener, questions: Sender<Question>, pin_path: PathBuf) {
    loop {
        match listener.accept().await {
            // One who goes away, or takes nothing, is nobody's concern.
            Ok((stream, _)) => drop(answer(stream, &questions, &pin_path).await),
            Err(_) => sleep(RETRY).await,
        }
    }
}

async fn answer(mut stream: UnixStream, questions: &Sender<Question>, pin_path: &Path) -> io::Result<()> {
    if stream.peer_cred()?.uid() != rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    let (question, tables) = oneshot::channel();
    // An agent that is about to end says nothing.
    if questions.send(question).await.is_err() {
        return Ok(());
    }
    let answer = match tables.await {
        Ok(Some(tables)) => {
            let pin_path = pin_path.to_owned();
            let compared = task::spawn_blocking(move || of_tables(&tables, &pin_path)).await;
            match compared {
                Ok(Ok(comparison)) => Answer::Compared(comparison),
                Ok(Err(error)) => Answer::Failed(format!("{:#}", anyhow::Error::from(error))),
                // Of maps that somebody else has written. The next one who asks is to be told, too.
                Err(panicked) => Answer::Failed(panicked.to_string()),
            }
        }
        Ok(None) => Answer::NotInSync,
        Err(_) => return Ok(()),
    };
    timeout(TAKEN, stream.write_all(&serde_json::to_vec(&answer)?)).await?
}

/// What comes of asking.
#[derive(Debug)]
pub(super) enum Asked {
    Answered(Answer),
    /// There is nobody to ask: why.
    Nobody(String),
}

/// Asks the agent with that number whose `--state-dir` this is, as seen from here.
pub(super) async fn ask(state_dir: &Path, pid: u32) -> Asked {
    match connect(state_dir, pid).await {
        Ok(stream) => Asked::Answered(hear(stream).await.unwrap_or_else(|error| Answer::Failed(error.to_string()))),
        Err(reason) => Asked::Nobody(format!("{}: {reason}", state_dir.join(FILE).display())),
    }
}

async fn connect(state_dir: &Path, pid: u32) -> Result<UnixStream, String> {
    let told = |error: io::Error| error.to_string();
    // The name of a socket has to be short, and the way to a directory of another process is long.
    let directory = File::open(state_dir).map_err(told)?;
    let path = format!("/proc/self/fd/{}/{FILE}", directory.as_raw_fd());
    let stream = UnixStream::connect(path).await.map_err(told)?;
    let listens = stream.peer_cred().map_err(told)?.pid();
    if listens.and_then(|listens| u32::try_from(listens).ok()) != Some(pid) {
        return Err("it is another process's than the agent's".into());
    }
    Ok(stream)
}

async fn hear(mut stream: UnixStream) -> io::Result<Answer> {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).await?;
    if text.is_empty() {
        return Err(io::Error::other("it has ended without an answer"));
    }
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tempfile::TempDir;

    use super::*;

    #[tokio::test]
    async fn an_agent_that_has_not_heard_everything_says_so_and_only_that_agent_is_asked() {
        let directory = TempDir::new().unwrap();
        let own = std::process::id();
        let nobody = async |pid| matches!(ask(directory.path(), pid).await, Asked::Nobody(_));
        assert!(nobody(own).await, "nobody listens");
        // What an agent before has left, however it ended.
        drop(std::os::unix::net::UnixListener::bind(directory.path().join(FILE)).unwrap());
        assert!(nobody(own).await, "nobody listens any more");
        let mut questions = serve(directory.path(), "/nonexistent/pins".into()).unwrap();
        let mode = fs::metadata(directory.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(nobody(own + 1).await, "another one's socket");
        tokio::spawn(async move {
            let _ = questions.recv().await.unwrap().send(None);
            let _ = questions.recv().await.unwrap().send(None);
            let _ = questions.recv().await.unwrap().send(Some(Tables::default()));
            drop(questions.recv().await);
        });
        // He who only looked was answered, too.
        assert!(matches!(ask(directory.path(), own).await, Asked::Answered(Answer::NotInSync)));
        for reason in ["cannot open map", "without an answer"] {
            let failed = ask(directory.path(), own).await;
            let is_told = matches!(&failed, Asked::Answered(Answer::Failed(error)) if error.contains(reason));
            assert!(is_told, "{failed:?}");
        }
    }
}
