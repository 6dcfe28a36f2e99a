"""Eighty sentences for the demonstration: eight topics, five things said in each, every one in two ways."""

PAIRS = (
    # weather
    ("It rained all night and the cellar is under water.", "The basement flooded after hours of heavy rain."),
    ("Snow has closed the mountain pass until further notice.", "The road over the mountains is shut because of snow."),
    ("A heat wave is expected to last through the weekend.", "Very hot weather will continue until Sunday."),
    ("Thick fog delayed every flight out of the airport this morning.", "No plane left on time, visibility was too poor."),
    ("The storm tore the roof off the old barn.", "Strong winds ripped away the top of a farm building."),
    # cooking
    ("Let the dough rest for an hour before you bake it.", "Bread tastes better if the dough can rise for sixty minutes."),
    ("Add a pinch of salt to bring out the taste of the chocolate.", "A little salt makes chocolate cake more flavourful."),
    ("The soup was far too spicy for the children.", "My kids could not eat the soup because it was so hot with chili."),
    ("How long should I boil an egg if I want a soft yolk?", "What is the right cooking time for a soft-boiled egg?"),
    ("She grows her own tomatoes and turns them into sauce.", "Her pasta sauce is made from tomatoes out of her garden."),
    # money
    ("The central bank raised interest rates by half a point.", "Borrowing became more expensive after the rate increase."),
    ("I cannot get a refund because I lost the receipt.", "The shop will not give my money back without proof of purchase."),
    ("Rents in the city have doubled within ten years.", "Housing costs twice as much here as it did a decade ago."),
    ("He saves a tenth of his salary every month.", "Each month ten percent of his pay goes into a savings account."),
    ("Shares of the car maker fell after the profit warning.", "The automobile company's stock dropped on weak earnings."),
    # medicine
    ("Take one tablet in the morning with a glass of water.", "The pill should be swallowed with water after you wake up."),
    ("The patient has had a fever and a sore throat for three days.", "He has a high temperature and pain when swallowing."),
    ("Regular exercise lowers the risk of heart disease.", "People who are physically active have fewer heart attacks."),
    ("The wound must be cleaned before it is bandaged.", "Wash the cut first, then put a dressing on it."),
    ("A new vaccine protects infants against the virus.", "Babies can now be immunized against this infection."),
    # software
    ("The program crashes when the input file is empty.", "An empty file makes the application fail at startup."),
    ("How do I undo my last commit without losing my changes?", "Revert the most recent commit but keep the modified files."),
    ("Sorting the list first makes every later search much faster.", "Lookups are quick once the array is in order."),
    ("The server ran out of memory and stopped answering.", "Requests timed out because the machine had no RAM left."),
    ("Please reset my password, I am locked out of my account.", "I cannot log in any more and need a new password."),
    # animals
    ("The cat sleeps on the warm windowsill all afternoon.", "Our kitten naps in the sun by the window after lunch."),
    ("A dog chased the postman down the street.", "The mail carrier was pursued along the road by a hound."),
    ("Swallows fly south before the first frost.", "These birds migrate to warmer countries in autumn."),
    ("Bees find their way back to the hive by the position of the sun.", "Honeybees navigate home with the help of sunlight."),
    ("The horse refused to jump over the last fence.", "At the final obstacle the mare stopped and would not leap."),
    # travel
    ("Which platform does the night train to Vienna leave from?", "Where do I board the overnight train for Vienna?"),
    ("We missed our connection and spent the night at the airport.", "After the late arrival we had to sleep in the terminal."),
    ("The hotel room overlooks a quiet harbour.", "From our window at the inn we could see the boats in the port."),
    ("Her suitcase was sent to the wrong country.", "The airline lost her luggage and flew it somewhere else."),
    ("You need a visa to stay longer than ninety days.", "Visits of more than three months require a permit."),
    # music and sport
    ("The orchestra tuned up while the audience took their seats.", "Musicians were warming up as people entered the hall."),
    ("She has been practising the violin since she was four.", "Playing the fiddle has been her life from early childhood."),
    ("The home team scored twice in the final minutes.", "Two late goals won the match for the hosts."),
    ("He broke the national record in the marathon.", "No runner from his country has ever finished the race faster."),
    ("The concert was cancelled because the singer lost her voice.", "There was no show, the vocalist was hoarse."),
)  # fmt: skip

SENTENCES = tuple(sentence for pair in PAIRS for sentence in pair)
