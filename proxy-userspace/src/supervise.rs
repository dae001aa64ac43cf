//! Tasks that must not end: one that panics is told of and started again, because an agent that has stopped to listen
//! looks healthy and is not.

use std::time::Duration;

use tokio::time::sleep;
use tracing::error;

/// Until a task is started again.
const PAUSE: Duration = Duration::from_secs(1);

/// Runs what `make` makes, in a task. It is over when it returns; when it panics, another is made.
pub(crate) fn spawn<F>(what: &'static str, mut make: impl FnMut() -> F + Send + 'static)
where
    F: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        while let Err(ended) = tokio::spawn(make()).await {
            if ended.is_cancelled() {
                return;
            }
            error!("{what} broke down and is started again: {ended}");
            sleep(PAUSE).await;
        }
    });
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::spawn;

    #[tokio::test]
    async fn a_task_that_panics_is_started_again_and_one_that_returns_is_not() {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let mut attempts = 0;
        spawn("a test", move || {
            attempts += 1;
            let (attempt, sender) = (attempts, sender.clone());
            async move {
                sender.send(attempt).unwrap();
                assert!(attempt == 2, "as expected");
            }
        });
        assert_eq!(receiver.recv().await, Some(1));
        assert_eq!(receiver.recv().await, Some(2));
        assert_eq!(receiver.recv().await, None);
    }
}
