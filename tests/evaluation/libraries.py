"""The CONVAI2 metrics from their libraries, without the package's own code."""


def directly(predictions: list[str], references: list[list[str]], model: str, layers: int) -> dict[str, float]:
    """The four libraries called directly: METEOR and ROUGE-L one reply at a time, BLEU and BERTScore in one call.

    BERTScore in one call because bert-score's own figures move in the fourth digit with what shares a batch.
    """
    import bert_score
    import sacrebleu
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score
    from rouge_score import rouge_scorer

    words = NLTKWordTokenizer().tokenize
    rouge = rouge_scorer.RougeScorer(["rougeL"])
    meteor, rouge_l = [], []
    for prediction, group in zip(predictions, references, strict=True):
        meteor.append(max(single_meteor_score(words(reference), words(prediction)) for reference in group))
        rouge_l.append(max(rouge.score(reference, prediction)["rougeL"].fmeasure for reference in group))
    most = max(map(len, references))
    streams = [[group[i] if i < len(group) else None for group in references] for i in range(most)]
    bert = bert_score.score(predictions, references, model_type=model, num_layers=layers)
    precision, recall, f1 = (100 * column.mean().item() for column in bert)
    result = {
        "bleu": sacrebleu.metrics.BLEU().corpus_score(predictions, streams).score,
        "meteor": 100 * sum(meteor) / len(meteor),
        "rouge_l": 100 * sum(rouge_l) / len(rouge_l),
        "bertscore_precision": precision,
        "bertscore_recall": recall,
        "bertscore_f1": f1,
    }
    return result | {"average": sum(result.values()) / 6}
