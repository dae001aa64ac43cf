//! What is wrong with each object at the moment. A relist that brings the same objects again is no news.

use std::collections::BTreeMap;

use super::{Defect, ObjectName, Problem};

/// So many defects of an object are told, and how many more there are.
const TOLD: usize = 16;

/// Defects by object.
#[derive(Debug, Default)]
pub struct Defects {
    known: BTreeMap<(&'static str, ObjectName), Vec<Defect>>,
    news: Vec<Defect>,
}

impl Defects {
    /// Says what is wrong with an object now. What was not wrong with it before is news.
    pub fn replace(&mut self, kind: &'static str, name: &ObjectName, mut found: Vec<Defect>) {
        if found.is_empty() && self.known.is_empty() {
            return;
        }
        cut(&mut found);
        let key = (kind, name.clone());
        let before = if found.is_empty() { self.known.remove(&key) } else { self.known.insert(key, found.clone()) };
        let before = before.unwrap_or_default();
        self.news.extend(found.into_iter().filter(|defect| !before.contains(defect)));
    }

    /// Forgets the objects of a kind that are there no more.
    pub fn retain<T>(&mut self, kind: &'static str, kept: &BTreeMap<ObjectName, T>) {
        self.known.retain(|(other, name), _| *other != kind || kept.contains_key(name));
    }

    /// Defects that are new since the last call.
    pub fn take_news(&mut self) -> Vec<Defect> {
        std::mem::take(&mut self.news)
    }
}

/// An object with a million faults must not fill the log.
fn cut(found: &mut Vec<Defect>) {
    let more = found.len().saturating_sub(TOLD);
    if let Some(object) = found.first().map(|defect| defect.object.clone()).filter(|_| more > 0) {
        found.truncate(TOLD);
        found.push(Defect { object, problem: Problem::More(more) });
    }
}

#[cfg(test)]
mod tests {
    use super::{Defect, Defects, ObjectName, Problem, TOLD};
    use crate::model::ObjectReference;

    fn defects(seconds: impl IntoIterator<Item = i32>) -> Vec<Defect> {
        let object = ObjectReference {
            kind: "Service",
            name: ObjectName { namespace: "n".into(), name: "a".into() },
            uid: "u".into(),
        };
        let defect = |seconds| Defect { object: object.clone(), problem: Problem::AffinitySeconds(seconds) };
        seconds.into_iter().map(defect).collect()
    }

    #[test]
    fn a_defect_is_news_when_it_appears_and_when_it_comes_back() {
        let mut known = Defects::default();
        let name = ObjectName { namespace: "n".into(), name: "a".into() };
        let steps: [(&[i32], &[i32]); 6] =
            [(&[0], &[0]), (&[0], &[]), (&[0, -1], &[-1]), (&[-1], &[]), (&[], &[]), (&[-1], &[-1])];
        for (found, news) in steps {
            known.replace("Service", &name, defects(found.iter().copied()));
            assert_eq!(known.take_news(), defects(news.iter().copied()), "{found:?}");
        }
        known.retain::<()>("EndpointSlice", &[].into());
        known.replace("Service", &name, defects([-1]));
        assert!(known.take_news().is_empty(), "slices are not Services");
        known.retain::<()>("Service", &[].into());
        known.replace("Service", &name, defects([-1]));
        assert_eq!(known.take_news().len(), 1, "the object was away");
    }

    #[test]
    fn an_object_with_a_million_faults_is_told_of_in_a_few_lines() {
        let mut known = Defects::default();
        known.replace("Service", &ObjectName::default(), defects(-1_000_000..0));
        let news = known.take_news();
        assert_eq!(news.len(), TOLD + 1);
        assert_eq!(news[TOLD].problem, Problem::More(1_000_000 - TOLD));
    }
}
