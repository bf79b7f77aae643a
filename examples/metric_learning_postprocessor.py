"""A postprocessor for open-metric-learning: reranks its RetrievalResults with the embeddings alone.

pip install . open-metric-learning omegaconf
python examples/metric_learning_postprocessor.py

Without open-metric-learning, which needs NumPy below 2, a stand-in takes its place. The embeddings are drawn.
"""

from types import SimpleNamespace

import torch
from superglobal import SuperGlobalReranker
from torch import LongTensor, Tensor
from torch.nn.utils.rnn import pad_sequence

try:
    from oml.interfaces.retrieval import IRetrievalPostprocessor
    from oml.retrieval import RetrievalResults
except ImportError:
    print("open-metric-learning is not installed: a stand-in with its interface runs instead")
    IRetrievalPostprocessor, RetrievalResults = object, SimpleNamespace


class SuperGlobalPostprocessor(IRetrievalPostprocessor):
    """Reorders the first M results of each query; the distances of the others continue, ascending."""

    def __init__(self, embeddings: Tensor, reranker: SuperGlobalReranker):
        self.embeddings, self.reranker = embeddings, reranker

    def process(self, rr, dataset):
        gallery = self.embeddings[dataset.get_gallery_ids()]
        ids = pad_sequence(rr.retrieved_ids, batch_first=True, padding_value=-1)  # a query may have fewer results
        scores = pad_sequence([-each for each in rr.distances], batch_first=True)
        found = self.reranker.rerank(self.embeddings[dataset.get_query_ids()], ids, gallery.__getitem__, scores=scores)
        distances = [-row[own >= 0] for row, own in zip(found.scores, found.ids, strict=True)]
        return RetrievalResults(
            distances=distances, retrieved_ids=[row[row >= 0] for row in found.ids], gt_ids=rr.gt_ids
        )


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(40).repeat_interleave(11)
    embeddings = torch.nn.functional.normalize(torch.randn(40, 32)[labels] + 1.3 * torch.randn(440, 32), dim=1)
    queries = torch.arange(0, 440, 11)
    gallery = LongTensor([number for number in range(440) if number % 11])
    dataset = SimpleNamespace(get_query_ids=lambda: queries, get_gallery_ids=lambda: gallery)
    distances, ids = torch.cdist(embeddings[queries], embeddings[gallery]).sort(dim=1)
    truth = [(labels[gallery] == labels[query]).nonzero().squeeze(1) for query in queries]
    before = RetrievalResults(distances=[*distances[:, :300]], retrieved_ids=[*ids[:, :300]], gt_ids=truth)
    after = SuperGlobalPostprocessor(embeddings, SuperGlobalReranker(m=200)).process(before, dataset)
    for title, rr in (("before", before), ("after", after)):
        right = [torch.isin(row[:10], own).float().mean() for row, own in zip(rr.retrieved_ids, rr.gt_ids, strict=True)]
        ascending = all((row.diff() >= 0).all() for row in rr.distances)
        print(f"{title}: precision@10 {100 * torch.stack(right).mean():.1f}, distances ascend: {ascending}")


if __name__ == "__main__":
    main()
